"""Distances between normal distributions against numeric integration, and what they do not depend on."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from syncbn.drift import (
    hellinger,
    jensen_shannon,
    log_var_ratio,
    mean_shift,
    output_error,
    symmetric_kl,
    wasserstein,
)

F64 = torch.float64
PAIRS = [(0.0, 1.0, 0.1, 1.1), (1.0, 2.0, 0.0, 1.0), (3.0, 1.0, 0.0, 1.0), (0.0, 0.05, 0.3, 1.0), (0.0, 4.0, 5.0, 0.5)]

Distance = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _integral(function: Callable[[float], float], u: float, w: float, p: float, q: float) -> float:
    """Over where either distribution has any weight, in pieces that follow both."""
    ends = sorted(mean + k * math.sqrt(var) for mean, var in ((u, w), (p, q)) for k in (-9, -6, -3, -1, 0, 1, 3, 6, 9))
    return sum(integrate.quad(function, a, b)[0] for a, b in pairwise(ends))


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_distances_are_their_integrals(pair: tuple[float, float, float, float]) -> None:
    u, w, p, q = pair
    first, second = stats.norm(u, math.sqrt(w)), stats.norm(p, math.sqrt(q))

    def log_ratio(x: float) -> float:
        return float(first.logpdf(x) - second.logpdf(x))

    def shannon(x: float) -> float:
        one, other = first.logpdf(x), second.logpdf(x)
        mixture = np.logaddexp(one, other) - math.log(2)
        return float(np.exp(one) * (one - mixture) + np.exp(other) * (other - mixture)) / 2

    def transport(level: float) -> float:
        return float((first.ppf(level) - second.ppf(level)) ** 2)

    a, b, c, d = torch.tensor(pair, dtype=F64).unsqueeze(1)
    jeffreys = _integral(lambda x: (first.pdf(x) - second.pdf(x)) * log_ratio(x), *pair)
    overlap = _integral(lambda x: math.sqrt(first.pdf(x) * second.pdf(x)), *pair)
    moved = integrate.quad(transport, 0, 1, limit=200)[0]
    assert symmetric_kl(a, b, c, d).item() == pytest.approx(jeffreys, rel=1e-6)
    assert hellinger(a, b, c, d).item() == pytest.approx(math.sqrt(1 - overlap), rel=1e-6)
    assert wasserstein(a, b, c, d).item() == pytest.approx(math.sqrt(moved / q), rel=1e-4)
    assert jensen_shannon(a, b, c, d).item() == pytest.approx(_integral(shannon, *pair), abs=1e-4)


def test_no_distance_changes_when_a_channel_is_rescaled_and_moved() -> None:
    u, w, p, q = torch.rand(4, 3, generator=torch.Generator().manual_seed(4), dtype=F64) + 0.5
    scale = torch.tensor([1e-2, 1.0, 1e3], dtype=F64)
    moved = (u * scale + 7, w * scale**2, p * scale + 7, q * scale**2)
    for distance in (symmetric_kl, wasserstein, hellinger, jensen_shannon, output_error):
        torch.testing.assert_close(distance(*moved, 0.0), distance(u, w, p, q, 0.0), rtol=1e-9, atol=0)
    torch.testing.assert_close(mean_shift(moved[0], *moved[2:], 0.0), mean_shift(u, p, q, 0.0), rtol=1e-9, atol=0)
    torch.testing.assert_close(log_var_ratio(moved[1], moved[3], 0.0), log_var_ratio(w, q, 0.0), rtol=1e-9, atol=0)


def test_equal_moments_are_no_distance_apart_and_far_ones_reach_the_bounds() -> None:
    zero, one = torch.zeros(1), torch.ones(1)
    for distance in (symmetric_kl, wasserstein, hellinger, jensen_shannon):
        assert distance(zero, one, zero, one, 1e-5).item() == pytest.approx(0, abs=1e-12)
        small = [distance(zero, one, torch.tensor([shift], dtype=F64), one, 0.0).item() for shift in (1e-6, 2e-6)]
        # Of first order or second, but with digits left.
        assert small[1] / small[0] == pytest.approx(2 if distance in (wasserstein, hellinger) else 4, rel=1e-3)
    assert hellinger(zero, one, 1e3 * one, one).item() == pytest.approx(1)
    assert jensen_shannon(zero, one, 1e3 * one, one).item() == pytest.approx(math.log(2), abs=1e-9)


def test_the_output_error_is_that_of_drawn_values_of_any_distribution() -> None:
    x = torch.empty(200_000, dtype=F64).exponential_(generator=torch.Generator().manual_seed(5))  # mean 1, variance 1
    change = (x - 1.3) / math.sqrt(0.6 + 1e-3) - (x - 1) / math.sqrt(1 + 1e-3)
    u, w, p, q = torch.tensor([1.3, 0.6, 1.0, 1.0], dtype=F64).unsqueeze(1)
    tolerance = 4 * change.square().std().item() / math.sqrt(len(x))
    assert output_error(u, w, p, q, 1e-3).item() == pytest.approx(change.square().mean().item(), abs=tolerance)


def test_a_collapsed_channel_stays_finite_with_eps() -> None:
    zero, one = torch.zeros(1), torch.ones(1)
    for distance in (symmetric_kl, wasserstein, hellinger, jensen_shannon):
        assert distance(zero, zero, zero, one, 1e-5).isfinite()
