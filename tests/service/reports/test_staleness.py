"""How far running statistics are off and why, as tables."""

import math
from typing import Any

import pytest

from service.jobs import DriftColour, StaleCause
from service.reports.staleness import judge_staleness
from tests.service.reports.records import drift_of, spec_of

G, A, R, U = DriftColour.GREEN, DriftColour.AMBER, DriftColour.RED, DriftColour.UNDECIDED
OLD: dict[str, Any] = {"initial_weight": 0.0}


@pytest.mark.parametrize(
    ("shift", "damage", "colour"),
    [
        (0.04, U, G),
        (0.04, R, G),
        (0.05, R, A),
        (0.20, R, A),
        (0.21, R, R),
        (0.21, A, R),
        (0.21, U, R),
        (0.21, G, A),  # never red where no damage is measured
    ],
)
def test_size_gives_the_colour_and_measured_harmlessness_bounds_it(
    shift: float, damage: DriftColour, colour: DriftColour
) -> None:
    verdict = judge_staleness([drift_of(0.01, shift, **OLD)], damage, spec_of())
    assert verdict.colour is colour
    assert verdict.worst_layer is not None
    assert verdict.worst_layer.layer == "layers.1"
    assert (verdict.cause is None) == (colour is G)


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"initial_weight": 0.02}, StaleCause.YOUNG),
        (OLD | {"expected_mean_shift": 0.16}, StaleCause.NOISE),  # 0.3 is within twice that
        (OLD | {"expected_mean_shift": 0.14}, StaleCause.LAG),
        (OLD | {"expected_mean_shift": 0.14, "max_abs_z": 4.0, "z_threshold": 4.2}, StaleCause.NOISE),
        (OLD | {"expected_mean_shift": 0.14, "max_abs_z": 9.0, "z_threshold": 4.2}, StaleCause.LAG),
        (OLD, StaleCause.LAG),  # by momentum 0.1 and 64 images: sqrt(0.1 / 1.9 / 64) = 0.029
    ],
)
def test_the_cause_is_the_start_or_chance_or_lag(fields: dict[str, Any], cause: StaleCause) -> None:
    verdict = judge_staleness([drift_of(0.3, **fields)], R, spec_of())
    assert (verdict.colour, verdict.cause) == (R, cause)


def test_a_shift_that_chance_explains_is_green_where_it_does_no_harm_unless_it_is_large() -> None:
    verdict = judge_staleness([drift_of(0.2, **OLD, expected_mean_shift=0.2)], G, spec_of())
    assert (verdict.colour, verdict.cause) == (G, None)
    assert "chance" in verdict.sentence
    large = judge_staleness([drift_of(0.3, **OLD, expected_mean_shift=0.2)], G, spec_of())
    assert (large.colour, large.cause) == (A, StaleCause.NOISE)


def test_what_older_jobs_did_not_record_is_reckoned_from_the_spec() -> None:
    """0.999^500 = 0.606; a lag of 0.999 / 0.001 = 999 steps."""
    verdict = judge_staleness([drift_of(0.3)], R, spec_of(bn_momentum=0.001))
    assert verdict.cause is StaleCause.YOUNG
    assert verdict.initial_weight == pytest.approx(0.999**500)
    assert verdict.lag_steps == pytest.approx(999)
    assert "0.61 of them is still their initial value" in verdict.sentence


def test_young_statistics_are_amber_where_damage_is_shown_though_no_mean_is_off() -> None:
    verdict = judge_staleness([drift_of(0.01, initial_weight=0.3)], R, spec_of())
    assert (verdict.colour, verdict.cause) == (A, StaleCause.YOUNG)


@pytest.mark.parametrize("shift", [math.nan, math.inf])
def test_a_shift_that_is_no_number_is_red_and_has_no_cause(shift: float) -> None:
    verdict = judge_staleness([drift_of(0.1, shift, **OLD)], R, spec_of())
    assert (verdict.colour, verdict.cause) == (R, None)
    assert "layers.1" in verdict.sentence
    assert "not finite" in verdict.sentence


def test_the_last_sample_of_the_latest_step_is_judged_and_none_is_undecided() -> None:
    samples = [drift_of(0.01, step=20, **OLD), drift_of(0.5, step=20, **OLD), drift_of(0.9, step=10, **OLD)]
    verdict = judge_staleness(samples, U, spec_of())
    assert (verdict.step, verdict.worst_layer and verdict.worst_layer.rms_mean_shift) == (20, 0.5)
    assert judge_staleness([], G, spec_of()).colour is U
    assert judge_staleness([drift_of()], G, spec_of()).colour is U
