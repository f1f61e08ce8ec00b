"""Block means of a noisy series, their trend with an interval, and whether they may be taken as independent."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Series: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Trend:
    """A straight line through block means: the change from the first step of the window to its last.

    ``change`` and its 95 % interval ``low`` to ``high`` are in the unit of the series.
    """

    change: float
    low: float
    high: float


def block_means(values: Series, block: int) -> Series:
    """Means of consecutive blocks of ``block`` values, counted from the end; the oldest remainder is left out.

    Shape: ``(n,) -> (n // block,)``. Finite values never overflow on the way.
    """
    num_blocks = len(values) // block
    kept = values[len(values) - num_blocks * block :].reshape(num_blocks, block)
    scale = float(np.abs(kept).max(initial=0.0)) or 1.0
    means: Series = (kept / scale).mean(axis=1) * scale
    return means


def fit_trend(means: Series) -> Trend:
    """Least squares over equally spaced block means, with Student's t interval on ``len(means) - 2`` degrees.

    Raises: ValueError below three block means.
    """
    n = len(means)
    if n < 3:
        raise ValueError(f"a trend with an interval needs at least 3 block means, not {n}")
    scale = float(np.abs(means).max()) or 1.0
    y = means / scale
    t = np.arange(n) - (n - 1) / 2
    slope = float(t @ y / (t @ t))
    residuals = y - y.mean() - slope * t
    half_width = float(stats.t.ppf(0.975, n - 2) * np.sqrt(residuals @ residuals / (n - 2) / (t @ t)))
    change, spread = n * slope * scale, n * half_width * scale
    return Trend(change, change - spread, change + spread)


def residual_correlation(means: Series) -> float:
    """Lag-1 correlation that is left once a cubic is taken out, corrected for what taking it out costs.

    A steady or bending slope makes neighbours alike without any memory in the noise, so it must go first; but
    residuals of independent noise are then negatively correlated. That expectation, ``tr(MLM) / tr(M)`` for
    the residual projection M and the one-step shift L, is subtracted. 0 where nothing but rounding is left.
    """
    n = len(means)
    scale = float(np.abs(means).max(initial=0.0)) or 1.0
    basis = np.polynomial.legendre.legvander(np.linspace(-1, 1, n), 3)
    projection = np.eye(n) - basis @ np.linalg.pinv(basis)
    residuals = projection @ (means / scale)
    power = float(residuals @ residuals)
    if n < 6 or power <= n * 1e-24:
        return 0.0
    expected = float(np.trace(projection @ np.eye(n, k=1) @ projection) / np.trace(projection))
    return float(residuals[:-1] @ residuals[1:]) / power - expected
