"""How fast the moments of a channel move with time, told from noise that remembers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from syncbn.drift.significance import threshold

_PER_STEPS = 100
_FEWEST_BLOCKS = 5
_MOST_CORRELATION = 0.15


@dataclass(frozen=True, eq=False)
class Trend:
    """Slopes of a layer's channels with intervals, ``(C,)`` each, in standard deviations per 100 steps."""

    slope: Tensor
    low: Tensor
    high: Tensor
    rms: float
    """Over channels, less what chance adds to it: ``sqrt(max(0, mean(slope^2 - error^2)))``."""
    num_blocks: int
    """Of how many block means the intervals are made."""


def fit_trend(values: Tensor, steps: Tensor, std: Tensor, *, level: float = 0.95, num_blocks: int = 10) -> Trend | None:
    """The trend of ``values`` ``(T, C)``, taken at ``steps`` ``(T,)``, in units of ``std`` ``(C,)``.

    A line is fitted to the means of ``num_blocks`` blocks, and its interval is Student's with that many less two
    degrees of freedom. Noise that remembers makes neighbouring blocks alike, and the interval too short: then blocks
    are made longer, and with less than five of them nothing is told. What is best passed are batch means at sampled
    steps; a running mean remembers ``1 / a`` steps.

    Returns:
        None if ``T`` is too small or the noise remembers for too long to tell.

    Raises:
        ValueError: if there are not as many values as steps, or fewer than five blocks.
    """
    if len(values) != len(steps) or num_blocks < _FEWEST_BLOCKS:
        raise ValueError(
            f"expected as many values as steps and at least {_FEWEST_BLOCKS} blocks, "
            f"got {len(values)}, {len(steps)} and {num_blocks}"
        )
    scaled = values.double() / std.double()
    while num_blocks >= _FEWEST_BLOCKS:
        size = len(values) // num_blocks
        if size > 0:
            # The oldest values are left out where blocks do not come out even.
            blocks = scaled[-size * num_blocks :].reshape(num_blocks, size, -1).mean(1)
            times = steps[-size * num_blocks :].to(blocks).reshape(num_blocks, size).mean(1)
            slope, residual, spread = _line(blocks, times / _PER_STEPS)
            if _correlation(residual) <= _MOST_CORRELATION:
                return _with_interval(slope, residual, spread, level)
        num_blocks //= 2
    return None


def _line(blocks: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes ``(C,)``, residuals ``(B, C)`` and the sum of squared times about their mean, by least squares."""
    time = (times - times.mean()).unsqueeze(1)
    spread = time.square().sum()
    slope = (time * blocks).sum(0) / spread
    return slope, blocks - blocks.mean(0) - time * slope, spread


def _correlation(residual: Tensor) -> float:
    """Of neighbouring blocks, over all channels; what fitting a line takes off it, about ``2 / B``, is added again."""
    scale = residual.square().sum()
    if scale == 0:
        return 0.0
    return float((residual[1:] * residual[:-1]).sum() / scale) + 2 / len(residual)


def _with_interval(slope: Tensor, residual: Tensor, spread: Tensor, level: float) -> Trend:
    num_blocks = len(residual)
    squared_error = residual.square().sum(0) / (num_blocks - 2) / spread
    half = threshold(1 - level, 1, float(num_blocks - 2)).to(slope) * squared_error.sqrt()
    rms = math.sqrt(max(0.0, float((slope.square() - squared_error).mean())))
    return Trend(slope, slope - half, slope + half, rms, num_blocks)
