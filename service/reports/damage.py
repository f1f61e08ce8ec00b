"""What stored statistics cost against population statistics, and which colour that deserves."""

import math
from dataclasses import dataclass

from service.jobs import DriftColour, Evaluation, loss_damage_colour
from service.jobs import Interval as Bootstrapped

Z_95 = 1.959964
AMBER_ACCURACY = 0.001
RED_ACCURACY = 0.005


@dataclass(frozen=True)
class Interval:
    """A mean of paired differences with its 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, mean: float, standard_error: float, bootstrapped: Bootstrapped | None = None) -> "Interval":
        """The interval that a bootstrap gave or, without one, ``mean +- 1.96 standard_error``.

        Both ends are NaN where a number is no number or the error negative.
        """
        if not math.isfinite(mean):
            return cls(mean, math.nan, math.nan)
        if bootstrapped and math.isfinite(bootstrapped.low) and math.isfinite(bootstrapped.high):
            return cls(mean, bootstrapped.low, bootstrapped.high)
        if not (math.isfinite(standard_error) and standard_error >= 0):
            return cls(mean, math.nan, math.nan)
        return cls(mean, mean - Z_95 * standard_error, mean + Z_95 * standard_error)

    @property
    def known(self) -> bool:
        """Whether there is an interval at all."""
        return math.isfinite(self.low) and math.isfinite(self.high)


def loss_damage(evaluation: Evaluation) -> Interval:
    """Stored minus population loss in nats."""
    return Interval.of(evaluation.loss_damage, evaluation.loss_damage_se, evaluation.loss_damage_interval)


def accuracy_damage(evaluation: Evaluation) -> Interval:
    """Population minus stored accuracy in shares of 1."""
    return Interval.of(evaluation.accuracy_damage, evaluation.accuracy_damage_se, evaluation.accuracy_damage_interval)


def colour_of(evaluation: Evaluation) -> DriftColour:
    """The colour of measured damage, by what its 95 % intervals make certain.

    Red: a loss damage certainly above 5 % of the population loss (`service.jobs.loss_damage_colour`), or a loss of
    accuracy certainly above 0.5 point, or stored statistics that give no finite loss. Amber: certainly above 1 %, or
    above 0.1 point. Undecided: no interval, or one of the loss that reaches from no matter into red. Green: everything
    else.
    """
    if not math.isfinite(evaluation.stored.loss):
        return DriftColour.RED
    loss, accuracy = loss_damage(evaluation), accuracy_damage(evaluation)
    by_loss = loss_damage_colour(loss.low, loss.high, evaluation.population.loss)
    if by_loss is DriftColour.RED or accuracy.low > RED_ACCURACY:
        return DriftColour.RED
    if not accuracy.known or evaluation.num_images < 2:
        return DriftColour.UNDECIDED
    return DriftColour.AMBER if accuracy.low > AMBER_ACCURACY else by_loss


def poor_under_both(evaluation: Evaluation, num_classes: int | None) -> bool:
    """Whether the network is no good even with population statistics, so that stale buffers are not the cause.

    Poor means an accuracy nearer to guessing than to perfect, or a loss above half the loss of guessing.
    """
    chance = 1 / num_classes if num_classes else 0.0
    best_accuracy = max(evaluation.stored.accuracy, evaluation.population.accuracy)
    best_loss = min(evaluation.stored.loss, evaluation.population.loss)
    too_high = num_classes is not None and best_loss > 0.5 * math.log(max(num_classes, 2))
    return best_accuracy < (1 + chance) / 2 or too_high
