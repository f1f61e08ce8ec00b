"""How likely chance alone makes two groups differ as they do: exact permutation tests, and Holm's correction."""

import math
from collections.abc import Sequence
from itertools import combinations, product

import numpy as np

from service.reports.blocks import Series

MOST_ARRANGEMENTS = 200_000
NUM_DRAWN = 100_000
SEED = 0
_ROUNDING = 1e-12
"""Relative: arrangements as far apart as the observed one must count, whatever the order of addition."""


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p of the mean of paired differences, over all 2^n ways to exchange the two of each pair.

    Beyond 17 pairs over 100,000 drawn ways, the observed one among them, so that p stays valid.
    Raises: ValueError without a pair or where a difference is not finite.
    """
    d = _finite(differences)
    if 2 ** len(d) <= MOST_ARRANGEMENTS:
        signs = np.array(list(product((1.0, -1.0), repeat=len(d))))
    else:
        signs = np.random.default_rng(SEED).choice((1.0, -1.0), (NUM_DRAWN, len(d)))
        signs[0] = 1.0
    return _two_sided(signs @ d, float(d.sum()), float(np.abs(d).sum()))


def unpaired_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p of the difference of means, over all ways to deal the values out to two groups of these sizes.

    Twice the smaller of both one-sided shares. Beyond 200,000 ways over 100,000 drawn ones, the observed among them.
    Raises: ValueError where a group is empty or a value is not finite.
    """
    a, b = _finite(first), _finite(second)
    n, pooled = len(a), np.concatenate([a, b])
    if math.comb(len(pooled), n) <= MOST_ARRANGEMENTS:
        dealt = np.array(list(combinations(range(len(pooled)), n)))
    else:
        dealt = np.random.default_rng(SEED).permuted(np.tile(np.arange(len(pooled)), (NUM_DRAWN, 1)), axis=1)[:, :n]
        dealt[0] = np.arange(n)
    return _two_sided(pooled[dealt].sum(axis=1), float(a.sum()), float(np.abs(pooled).sum()))


def smallest_p(num_first: int, num_second: int, *, paired: bool) -> float:
    """What so many runs can reach at best: only one arrangement, and its mirror, is as extreme as the observed one."""
    arrangements = 2**num_first if paired else math.comb(num_first + num_second, num_first)
    if arrangements > MOST_ARRANGEMENTS:
        return 2 / NUM_DRAWN
    return min(1.0, 2 / arrangements)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """The p values adjusted so that all together err no more often than stated (Holm 1979), in their order."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = least
    return tuple(adjusted)


def _two_sided(sums: Series, observed: float, scale: float) -> float:
    slack = _ROUNDING * scale
    above, below = float(np.mean(sums >= observed - slack)), float(np.mean(sums <= observed + slack))
    return min(1.0, 2 * min(above, below))


def _finite(values: Sequence[float]) -> Series:
    array = np.asarray(values, np.float64)
    if not len(array) or not np.isfinite(array).all():
        raise ValueError(f"a permutation test needs finite values, at least one a group, not {list(values)}")
    return array
