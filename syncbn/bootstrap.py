"""The bootstrap over images: how far the mean of a thousand paired differences may be from that of all images.

Per-image differences of losses are skewed, and a few images carry most of them, so that "mean plus or minus two
standard errors" is too short on the one side and too long on the other. `mean_interval` shifts for that.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_ROUNDING = 1e-14  # of the largest value: some sixty roundings of a double
_VALUES_AT_ONCE = 1 << 19  # drawn values held at a time: four megabytes of doubles


def mean_interval(
    values: Tensor, *, level: float = 0.95, num_resamples: int = 2000, generator: torch.Generator
) -> tuple[float, float]:
    """An interval that covers the mean of what ``values`` were drawn from in a share ``level`` of such samples.

    The bias-corrected and accelerated percentiles (Efron 1987, "Better bootstrap confidence intervals", section 4) of
    the means of ``num_resamples`` samples of the same size, drawn with replacement. For a mean both of its constants
    are the skewness of ``values`` over ``6 sqrt(N)``; that is steadier for values that repeat, such as accuracy's, than
    to count resamples below the mean. Paired differences are given as one value for each pair.

    The sample must show what there is to see: all values equal give an interval of no width, and where fewer than
    about ten differ from the rest the interval is too short. docs/diagnostics.md has the measured coverage.

    Args:
        values: ``(N,)``, at least one; computed in float64 on the CPU.
        level: above 0 and below 1.
        num_resamples: at least 2; with 2000 an end is off by about 3 % of the interval's length from draw to draw.
        generator: of the CPU; the same one in the same state gives the same bits.

    Returns:
        Low and high end, in the unit of ``values``; two NaN if a value is not finite.
    Cost: ``num_resamples * N`` draws: about 10 ns each on one core, 4 to 8 MB of memory.
    Raises: ValueError for no values, more than one dimension, or a level or number that is out of range.
    """
    _check(values, level, num_resamples)
    sample = values.detach().to("cpu", torch.float64)
    if not sample.isfinite().all():
        return math.nan, math.nan
    mean = sample.mean()
    centred = sample - mean  # resampled means then keep their digits however far from 0 the values are
    if not centred.any():
        return mean.item(), mean.item()
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    means = torch.cat(list(_resampled_means(centred, num_resamples, generator)))
    ends = mean + torch.quantile(means, _shifted(tail, _acceleration(centred)))
    rounding = sample.abs().max() * _ROUNDING  # so that an end at 0 is 0, and lies neither above nor below
    low, high = torch.where(ends.abs() > rounding, ends, 0.0).tolist()
    return low, high


def _check(values: Tensor, level: float, num_resamples: int) -> None:
    if values.ndim != 1 or values.numel() == 0:
        raise ValueError(f"values are of shape {tuple(values.shape)}; give a vector of at least one")
    if not 0 < level < 1:
        raise ValueError(f"level {level} is not between 0 and 1; for a 95 % interval give 0.95")
    if num_resamples < 2:
        raise ValueError(f"num_resamples {num_resamples} is below 2; 1000 or more give a steady interval")


def _resampled_means(sample: Tensor, num_resamples: int, generator: torch.Generator) -> Iterator[Tensor]:
    size = len(sample)
    at_once = max(1, _VALUES_AT_ONCE // size)
    for start in range(0, num_resamples, at_once):
        rows = min(at_once, num_resamples - start)
        drawn = torch.randint(size, (rows * size,), generator=generator, dtype=torch.int32)
        yield sample.index_select(0, drawn).view(rows, size).mean(dim=1)


def _acceleration(centred: Tensor) -> Tensor:
    """Skewness over ``6 sqrt(N)``: how fast the standard error of a mean changes with the mean."""
    sd = centred.square().mean().sqrt()
    return (centred / sd).pow(3).mean() / (6 * math.sqrt(len(centred)))


def _shifted(tail: Tensor, acceleration: Tensor) -> Tensor:
    """The percentiles to read in place of ``tail`` (Efron 1987, equation 4.5, the bias ``z0`` being ``a``)."""
    shifted = acceleration + torch.special.ndtri(tail)
    percentiles: Tensor = torch.special.ndtr(acceleration + shifted / (1 - acceleration * shifted))
    return percentiles
