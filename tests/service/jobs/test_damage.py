"""What of a damage matters, by the interval alone."""

import math

import pytest

from service.jobs import DriftColour, loss_damage_colour

G, A, R, U = DriftColour.GREEN, DriftColour.AMBER, DriftColour.RED, DriftColour.UNDECIDED


@pytest.mark.parametrize(
    ("low", "high", "loss", "colour"),
    [
        (-0.001, 0.001, 0.1, G),
        (0.002, 0.009, 0.1, G),  # certain, and too little
        (0.006, 0.02, 0.1, A),  # certainly above 0.005
        (0.006, 0.2, 0.1, A),
        (0.026, 0.03, 0.1, R),  # certainly above 0.025
        (0.004, 0.026, 0.1, U),  # may be nothing, may be red
        (0.006, 0.02, 2.0, G),  # 1 % of 2 is 0.02
        (0.021, 0.09, 2.0, A),
        (0.11, 0.2, 2.0, R),
        (0.01, 0.11, 2.0, U),
        (0.006, 0.02, None, A),
        (-0.3, -0.2, 0.1, G),
        (math.nan, 0.2, 0.1, U),
        (0.1, math.inf, 0.1, U),
        (0.1, 0.2, math.nan, U),
        (0.1, 0.2, math.inf, U),
    ],
)
def test_only_damage_that_is_certain_and_large_enough_has_a_colour(
    low: float, high: float, loss: float | None, colour: DriftColour
) -> None:
    assert loss_damage_colour(low, high, loss) is colour
