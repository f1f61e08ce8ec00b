"""Whether a difference is more than chance: z, its probability, and the threshold for the largest of many.

The unit of chance is the image (`syncbn.drift.sampling`). Under still weights and equal data the z of this module
follow Student's t with the given degrees of freedom; weights that move, or other data, make them larger.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from syncbn.drift.moving_average import effective_batches
from syncbn.drift.sampling import ImageMoments

_MANY = 200.0  # degrees of freedom, from which on an expansion about the normal distribution is used
_FRACTIONS = 60  # terms of the continued fraction: enough for as many degrees
_NEWTON_STEPS = 12
_TINY = 1e-300


@dataclass(frozen=True, eq=False)
class Deviation:
    """A difference in standard errors: ``z`` ``(C,)``, about Student's t with ``degrees`` of freedom, and its size."""

    z: Tensor
    degrees: Tensor
    size: Tensor
    """``(C,)``, in standard deviations of the values."""
    expected_size: Tensor
    """``(C,)``: the standard error itself, in standard deviations: the root mean square of ``size`` under chance."""


def batch_deviation(batch: ImageMoments, running_mean: Tensor, momentum: float | None, num_steps: int = 0) -> Deviation:
    """A batch (of all ranks) less the running mean before it is updated by that batch: ``m - u``.

    Its variance is ``s2 / n (1 + a / (2 - a))``: that of the batch mean, and that of the average over batches of as
    many images. After the update the difference is ``1 - a`` of what it was.
    """
    return _deviation(batch.mean - running_mean.double(), batch, 1 / effective_batches(momentum, num_steps) + 1)


def population_deviation(
    running_mean: Tensor, population: ImageMoments, momentum: float | None, num_images: int, num_steps: int = 0
) -> Deviation:
    """The running mean less the population's: ``u - p``, where a step has ``num_images`` on all ranks together.

    Its variance is ``s2 (a / (2 - a) / n + 1 / N)`` with the ``N`` images of ``population``, drawn apart from those
    trained on; where they are the same images the variance is smaller, so that z is, too.
    """
    share = population.num_images / (num_images * effective_batches(momentum, num_steps))
    return _deviation(running_mean.double() - population.mean, population, share + 1)


def two_sided_p(z: Tensor, degrees: Tensor | float = math.inf) -> Tensor:
    """Probability of a larger ``|z|`` by chance, of ``z``'s shape; by default that of the normal distribution.

    Its relative error is below 2e-8 up to ``|z| = 10``, and below 1e-4 wherever it is no less than 1e-290.
    """
    z = z.double()
    degrees = torch.as_tensor(degrees, dtype=torch.float64, device=z.device) + torch.zeros_like(z)
    squared = z.square()
    few = degrees.clamp(max=_MANY)
    student = _incomplete_beta(few / (few + squared), few)
    normal = torch.special.erfc(_as_normal(z.abs(), degrees.clamp(min=_MANY)) / math.sqrt(2))
    return torch.where(degrees > _MANY, normal, student)


def normal_equivalent(z: Tensor, degrees: Tensor | float) -> Tensor:
    """What of the normal distribution is as improbable as ``z`` of Student's: signed, of ``z``'s shape, at most 37."""
    p = two_sided_p(z, degrees).clamp(min=1e-300)
    equivalent: Tensor = torch.special.ndtri(p / 2)
    return equivalent.abs() * z.double().sign()


def threshold(level: float, num_tests: int, degrees: Tensor | float = math.inf) -> Tensor:
    """What the largest ``|z|`` of ``num_tests`` passes by chance with at most the probability ``level``.

    Bonferroni's: each test has ``level / num_tests``, two-sided, whatever they have to do with each other. Of the
    shape of ``degrees``.

    Raises:
        ValueError: if ``level`` is not between 0 and 1 or there is no test.
    """
    if not 0 < level < 1 or num_tests < 1:
        raise ValueError(f"expected a level between 0 and 1 and at least one test, got {level} and {num_tests}")
    p = level / num_tests
    degrees = torch.as_tensor(degrees, dtype=torch.float64)
    t: Tensor = -torch.special.ndtri(torch.full_like(degrees, p / 2))
    # Newton on log p over log t, a falling concave curve: from the first step on it comes from the right. It is
    # straight where degrees are few and the threshold is far, 1e6 times the normal one for one degree.
    for _ in range(_NEWTON_STEPS):
        tail = two_sided_p(t, degrees)
        t = t * torch.exp((tail / p).log() * tail / (2 * t * _density(t, degrees)))
    return t


def _deviation(difference: Tensor, moments: ImageMoments, factor: Tensor | float) -> Deviation:
    variance = moments.between_var / moments.num_images * factor
    std = moments.var.sqrt()
    degrees = (moments.num_images - 1).expand_as(difference)
    return Deviation(difference / variance.sqrt(), degrees, difference / std, variance.sqrt() / std)


def _density(t: Tensor, degrees: Tensor) -> Tensor:
    """Of Student's t."""
    half = degrees / 2
    log_scale = torch.lgamma(half + 0.5) - torch.lgamma(half) - (math.pi * degrees).log() / 2
    student = torch.exp(log_scale - (half + 0.5) * torch.log1p(t.square() / degrees))
    normal = torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)
    return torch.where(degrees.isinf(), normal, student)


def _as_normal(t: Tensor, degrees: Tensor) -> Tensor:
    """The normal deviate of as small a probability, for many degrees (Hill 1970, its first three terms)."""
    a = degrees - 0.5
    b = 48 * a.square()
    y = (a * torch.log1p(t.square() / degrees)).sqrt()
    y2 = y.square()
    z = y + y * (y2 + 3) / b - y * (((4 * y2 + 33) * y2 + 240) * y2 + 855) / (10 * b.square())
    return torch.where(degrees.isinf(), t, z)


def _incomplete_beta(x: Tensor, degrees: Tensor) -> Tensor:
    """Regularized ``I_x(f / 2, 1 / 2)``, of ``x`` from 0 to 1 (DLMF 8.17.22, by the method of Lentz)."""
    a, b = degrees / 2, torch.full_like(degrees, 0.5)
    swap = x > (a + 1) / (a + b + 2)
    first, second = torch.where(swap, b, a), torch.where(swap, a, b)
    y = torch.where(swap, 1 - x, x)
    log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
    front = torch.exp(first * y.log() + second * torch.log1p(-y) - log_beta) / first
    value = front * _continued_fraction(y, first, second)
    return torch.where(swap, 1 - value, value)


def _continued_fraction(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    c = torch.ones_like(x)
    d = 1 / _away_from_zero(1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, _FRACTIONS):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _away_from_zero(1 + term * d)
            c = _away_from_zero(1 + term / c)
            fraction = fraction * d * c
    return fraction


def _away_from_zero(x: Tensor) -> Tensor:
    return torch.where(x.abs() < _TINY, _TINY, x)
