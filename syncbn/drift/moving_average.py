"""What an exponential moving average remembers: how much of its start, how old it is, how much noise it lets through.

``u <- (1 - a) u + a m`` at each step; ``a`` is torch's momentum, the weight of the new value. ``a = None`` is torch's
cumulative average, in which all batches so far weigh alike.
"""

import math

import torch
from torch import Tensor

_HALVINGS = 60  # of the interval from 0 to 1: to the last bit of a double


def initial_weight(momentum: float | None, num_steps: int) -> float:
    """Share of the initial value in the average: ``(1 - a)^t``, from 0 to 1."""
    _check(momentum)
    if num_steps < 0:
        raise ValueError(f"expected a number of steps, got {num_steps}")
    if momentum is None:
        return float(num_steps == 0)
    return float((1 - momentum) ** num_steps)


def lag_steps(momentum: float | None, num_steps: int = 0) -> float:
    """Mean age of what is averaged, in steps: ``(1 - a) / a``, infinite for ``a = 0``. Cumulative: ``(t - 1) / 2``."""
    _check(momentum)
    if momentum is None:
        return max(num_steps - 1, 0) / 2
    return (1 - momentum) / momentum if momentum else math.inf


def half_life(momentum: float) -> float:
    """Steps after which a batch weighs half of what it did: ``ln 2 / -ln(1 - a)``."""
    _check(momentum)
    if momentum in (0, 1):
        return 0.0 if momentum else math.inf
    return math.log(2) / -math.log1p(-momentum)


def effective_batches(momentum: float | None, num_steps: int = 0) -> float:
    """How many batches, weighing alike, would leave as much noise: ``(2 - a) / a``. Cumulative: ``t``."""
    _check(momentum)
    if momentum is None:
        return float(num_steps)
    return (2 - momentum) / momentum if momentum else math.inf


def noise(momentum: float, between_var: Tensor, num_images: int) -> Tensor:
    """Standard deviation of the running mean for still weights, in units of the values: ``sqrt(s2 / n a / (2 - a))``.

    ``between_var`` is the variance over images of their spatial mean (`ImageMoments.between_var`), of any shape;
    ``num_images`` those of one step on all ranks together.
    """
    return (between_var.double() / (num_images * effective_batches(momentum))).sqrt()


def lag_bias(momentum: float, slope: Tensor) -> Tensor:
    """How far the average trails a value that moves by ``slope`` a step: ``slope (1 - a) / a``."""
    return slope.double() * lag_steps(momentum)


def smallest_momentum(num_steps: int, left: float = 0.01) -> float:
    """The momentum that leaves the share ``left`` of the initial value after ``num_steps`` steps.

    Raises:
        ValueError: if ``num_steps`` is not positive or ``left`` is not between 0 and 1.
    """
    if num_steps < 1 or not 0 < left < 1:
        raise ValueError(f"expected at least one step and a share between 0 and 1, got {num_steps} and {left}")
    return -math.expm1(math.log(left) / num_steps)


def best_momentum(between_var: Tensor, num_images: int, slope: Tensor) -> Tensor:
    """The momentum of least mean squared error, noise squared plus lag bias squared, for each pair of elements.

    It solves ``a^3 = k (1 - a) (2 - a)^2`` with ``k = slope^2 n / s2``, about ``(4 k)^(1/3)`` for small k. For one
    momentum for a whole layer, pass the means over channels of ``s2 / q`` and, as a root, of ``slope^2 / q``.
    A value that does not move has 0, for then a longer average is always better; one without noise has 1.
    """
    k = slope.double().square() * num_images / between_var.double()
    low, high = torch.zeros_like(k), torch.ones_like(k)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        is_small = middle**3 < k * (1 - middle) * (2 - middle).square()
        low, high = torch.where(is_small, middle, low), torch.where(is_small, high, middle)
    return torch.where(k.isnan(), k, torch.where(k == 0, 0.0, torch.where(k.isinf(), 1.0, high)))


def _check(momentum: float | None) -> None:
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"expected a momentum from 0 to 1, the weight of the new value, got {momentum}")
