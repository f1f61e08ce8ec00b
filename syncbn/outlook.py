"""Outlook: what a layer's running statistics will be worth, reckoned before any training.

Symbols: ``n`` images share a batch statistic, each with ``S`` positions and a design effect of ``D``
(`syncbn.drift.design_effect`); ``a`` is the momentum, as torch counts it, and ``T`` the number of training steps.
What depends on how the weights move cannot be reckoned ahead: the lag is told in steps, and the noise is that of
weights that stand still.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from syncbn.drift.moving_average import effective_batches, initial_weight, lag_steps, smallest_momentum

NOISE_LIMIT = 0.2
"""Standard deviations; from there on the stored statistics of a layer are judged stale, whatever the reason."""
START_LIMIT = 0.05
"""Share of the running statistics that may still be mean 0 and variance 1 at the end."""


class Risk(StrEnum):
    """What speaks against running statistics before they exist."""

    NOISY = "noisy"
    """They will be off by more than `NOISE_LIMIT` by chance alone."""
    YOUNG = "young"
    """More than `START_LIMIT` of them will still be what they began with."""


@dataclass(frozen=True)
class StatisticsOutlook:
    """What is to be expected of one layer's statistics. No number depends on the scale of a channel.

    ``batch_mean_error``: standard error of one batch's mean, ``sqrt(D / (n S))`` standard deviations.
    ``running_mean_noise``: standard deviation of the running mean after ``T`` steps by chance alone,
        ``sqrt((1 - (1 - a)^(2 T)) a / (2 - a))`` of the former. A population of ``N`` images adds its own.
    ``var_bias``: of a batch's variance with Bessel's correction, relative: ``-(D - 1) / (n S - 1)``; NaN where a batch
        is a single value.
    ``lag_steps``: mean age of the batches in the running statistics.
    ``initial_weight``: share of the running statistics that is still their start, ``(1 - a)^T``.
    ``quiet_momentum``, ``quiet_images``: the largest momentum, and the fewest images with this momentum, whose noise
        is at most `NOISE_LIMIT` in a long run.
    ``grown_momentum``: the smallest momentum that leaves at most 1 % of the start after ``T`` steps. Above
        ``quiet_momentum``, no momentum does for both: more images or more steps are needed.
    """

    batch_mean_error: float
    running_mean_noise: float
    var_bias: float
    lag_steps: float
    initial_weight: float
    quiet_momentum: float
    quiet_images: int
    grown_momentum: float

    @property
    def risks(self) -> tuple[Risk, ...]:
        """What to warn of."""
        found = {Risk.NOISY: self.running_mean_noise > NOISE_LIMIT, Risk.YOUNG: self.initial_weight > START_LIMIT}
        return tuple(risk for risk, is_found in found.items() if is_found)


def foresee(
    num_images: int, positions: int, momentum: float, num_steps: int, design_effect: float | None = None
) -> StatisticsOutlook:
    """The outlook for a layer; ``design_effect`` as measured, or by default as typical (`typical_design_effect`).

    ``design_effect=positions`` is the worst case, in which all positions of an image say the same.

    Raises:
        ValueError: if a count is not positive, ``momentum`` not in ``(0, 1]``, or ``design_effect`` negative.
    """
    if min(num_images, positions, num_steps) < 1:
        raise ValueError(f"images, positions and steps are 1 or more; got {num_images}, {positions} and {num_steps}")
    if not 0 < momentum <= 1:
        raise ValueError(f"a momentum is above 0 and at most 1; got {momentum}")
    effect = typical_design_effect(positions) if design_effect is None else design_effect
    if effect < 0:
        raise ValueError(f"a design effect is 0 or more; got {effect}")
    num_values = num_images * positions
    start = initial_weight(momentum, num_steps)
    error_of_image = math.sqrt(effect / positions)
    batch_error = error_of_image / math.sqrt(num_images)
    return StatisticsOutlook(
        batch_mean_error=batch_error,
        running_mean_noise=batch_error * math.sqrt((1 - start**2) / effective_batches(momentum)),
        var_bias=(1 - effect) / (num_values - 1) if num_values > 1 else math.nan,
        lag_steps=lag_steps(momentum),
        initial_weight=start,
        quiet_momentum=_quiet_momentum(batch_error),
        quiet_images=max(1, math.ceil((error_of_image / NOISE_LIMIT) ** 2 / effective_batches(momentum))),
        grown_momentum=smallest_momentum(num_steps),
    )


def typical_design_effect(positions: int) -> float:
    """``sqrt(S)``: 1 for a fully connected layer, where it is exact, and else the right order of magnitude.

    Measured in ResNet-20 on images of 28 x 28 pixels after 60 steps: 40 to 95 for 784 positions, 8 to 21 for 196 and
    6 to 16 for 49, where it says 28, 14 and 7; with its first weights 27 to 69, 6 to 8 and 2. On digits of 8 x 8
    pixels, all in the same place, it is 0.4 to 1.9, and the noise, which goes with the root, a third of what this says.
    """
    return math.sqrt(positions)


def _quiet_momentum(batch_error: float) -> float:
    """Solves ``a / (2 - a) = x``, where ``x`` is the share of a batch's variance that the limit allows."""
    if batch_error <= NOISE_LIMIT:
        return 1.0
    share = (NOISE_LIMIT / batch_error) ** 2
    return 2 * share / (1 + share)
