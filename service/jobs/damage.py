"""How much of what stored statistics cost matters: one rule for reports and for what may be shipped."""

import math

from service.jobs.report import DriftColour

AMBER_LOSS_SHARE = 0.01
RED_LOSS_SHARE = 0.05
LEAST_SCALE = 0.5
"""Nats. A smaller loss counts as this one, so that 0.005 nats is the least that matters: by that the probability of the
right class falls by half a percent, in the geometric mean. A share of next to nothing matters to nobody."""


def loss_damage_colour(low: float, high: float, population_loss: float | None) -> DriftColour:
    """The colour of a loss damage in nats whose 95 % interval is ``low`` to ``high``.

    Only what is certain counts. Red: the whole interval lies above 5 % of the population's loss; amber: above 1 %, the
    loss counted as half a nat at least, and if it is not known. Undecided: the interval reaches from what does not
    matter into red, or something is not finite. Green: everything else.
    """
    scale = LEAST_SCALE if population_loss is None else _at_least(LEAST_SCALE, population_loss)
    if not (math.isfinite(low) and math.isfinite(high) and math.isfinite(scale)):
        return DriftColour.UNDECIDED
    if low > RED_LOSS_SHARE * scale:
        return DriftColour.RED
    if low > AMBER_LOSS_SHARE * scale:
        return DriftColour.AMBER
    return DriftColour.UNDECIDED if high > RED_LOSS_SHARE * scale else DriftColour.GREEN


def _at_least(smallest: float, loss: float) -> float:
    return loss if not loss < smallest else smallest  # NaN stays NaN
