"""Time to target: first, confirmed, censored."""

import math

import pytest

from service.jobs import Target, TargetVerdict
from service.reports import reach_target
from tests.service.reports.evaluations import evaluated

_GOAL = Target(metric="accuracy", value=0.9)


@pytest.mark.parametrize(
    ("accuracies", "verdict", "step"),
    [
        ([0.5, 0.91, 0.92, 0.9], TargetVerdict.REACHED, 20),
        ([0.5, 0.91, 0.8, 0.9, 0.9, 0.9, 0.2], TargetVerdict.REACHED, 40),
        ([0.5, 0.91, 0.92], TargetVerdict.UNCONFIRMED, 30),
        ([0.95], TargetVerdict.UNCONFIRMED, 10),
        ([0.95, 0.95, 0.89], TargetVerdict.NOT_REACHED, 30),
        ([0.95, math.nan, 0.95, 0.95], TargetVerdict.UNCONFIRMED, 40),
        ([], TargetVerdict.NOT_REACHED, None),
    ],
)
def test_a_target_is_reached_where_two_more_evaluations_confirm_it(
    accuracies: list[float], verdict: TargetVerdict, step: int | None
) -> None:
    runs = [evaluated(10 * (n + 1), accuracy=a) for n, a in enumerate(accuracies)]
    found = reach_target(runs, _GOAL)
    assert (found.verdict, found.step) == (verdict, step)


def test_steps_images_and_seconds_are_those_of_the_first_evaluation_there() -> None:
    runs = [evaluated(step, loss=3 / step) for step in (40, 10, 20, 30)]
    found = reach_target(runs, Target(metric="loss", value=0.15), images_per_step=64, seconds={20: 1.5, 30: 2.5})
    assert (found.step, found.num_images, found.wall_s, found.score) == (20, 1280, 1.5, 0.15)
    assert found.sentence == "Reached loss 0.15 after step 20, 1280 images, 1.5 s; the next 2 evaluations confirm it."


def test_what_is_missing_is_said() -> None:
    assert "2 more evaluations" in reach_target([evaluated(10, accuracy=0.95)], _GOAL).sentence
    both = [evaluated(step, accuracy=0.95) for step in (10, 20)]
    assert "1 more evaluation." in reach_target(both, _GOAL).sentence
    assert "evaluate_every_steps" in reach_target([], _GOAL).sentence


def test_of_a_repeated_step_the_later_evaluation_counts() -> None:
    runs = [evaluated(s, accuracy=0.95) for s in (10, 20, 30)] + [evaluated(20, accuracy=0.1)]
    assert reach_target(runs, _GOAL).verdict is TargetVerdict.UNCONFIRMED
