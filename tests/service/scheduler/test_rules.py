"""What follows from the course of a run, as a table, and courses put together from what runs tell."""

import math
from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import pytest

from service.jobs import (
    DriftMetric,
    JobEvent,
    JobSpec,
    LimitAction,
    LimitExceeded,
    MetricSeries,
    NonFinite,
    NonFinitePlace,
    Reason,
    TelemetryEvent,
)
from service.jobs.fact import Telemetry
from service.scheduler.rules import Ruling, has_rules
from service.scheduler.run_course import RunCourse
from tests.service.store.telling import TIME, evaluation, started


def exceeded(step: int, layer: str = "bn", action: LimitAction = LimitAction.PAUSE) -> LimitExceeded:
    metric = DriftMetric.RMS_MEAN_SHIFT
    return LimitExceeded(step=step, limit=0, layer=layer, metric=metric, value=0.25, above=0.2, action=action)


def found(step: int, place: NonFinitePlace = NonFinitePlace.OTHER_RANK, tensor: str = "") -> NonFinite:
    return NonFinite(step=step, place=place, tensor=tensor)


class Run:
    """A run of a job with these fields that tells what a test says."""

    def __init__(self, **fields: object) -> None:
        self.course = RunCourse(JobSpec.model_validate({"name": "t", "max_steps": 4000, **fields}))
        self.attempt = 0
        self._seq: Iterator[int] = count(1)

    def begin(self, resumed_step: int = 0) -> None:
        self.attempt += 1
        for rank in (0, 1):
            self.tell(started(resumed_step, total_steps=4000), rank=rank)

    def tell(self, fact: Telemetry | TelemetryEvent, *, rank: int = 0, attempt: int | None = None) -> None:
        body = fact.model_dump(mode="json")
        if body["type"] in self.course.topics:
            event = {"time": TIME, "type": body["type"], "attempt": attempt or self.attempt, "rank": rank}
            self.course.take_events([JobEvent.model_validate(event | {"seq": next(self._seq), "body": body})])

    def train(self, losses: Sequence[float]) -> None:
        first = self.course.last_step + 1
        steps = tuple(range(first, first + len(losses)))
        series = MetricSeries(name="train/loss", rank=None, steps=steps, values=tuple(losses), num_points=len(steps))
        self.course.take_losses(series, steps[-1])

    def reason(self) -> Reason | None:
        ruling = self.course.ruling()
        return ruling.reason if ruling else None


def flat(num_steps: int, seed: int = 0) -> list[float]:
    return [float(loss) for loss in 1 + 0.01 * np.random.default_rng(seed).standard_normal(num_steps)]


def falling(num_steps: int) -> list[float]:
    return [3 / step**0.3 for step in range(1, num_steps + 1)]


@pytest.mark.parametrize(
    ("fields", "losses", "reason"),
    [
        ({"stop_when": ["diverged"]}, [1.0, math.nan], Reason.DIVERGED),
        ({"stop_when": ["plateau"]}, [1.0, math.nan], None),
        ({"stop_when": ["diverged"]}, flat(1000), None),
        ({"stop_when": ["plateau"]}, flat(1000), Reason.PLATEAU_REACHED),
        ({"stop_when": ["plateau", "diverged"]}, falling(1000), None),
        ({"stop_when": ["diverged"]}, [*falling(1000), *[30.0] * 200], Reason.DIVERGED),
        ({"stop_when": ["plateau"]}, flat(100), None),
        ({"stop_when": ["target"], "target": {"value": 0.9}}, flat(1000), None),
    ],
)
def test_a_loss_ends_a_run_only_by_the_rules_that_were_asked_for(
    fields: dict[str, object], losses: list[float], reason: Reason | None
) -> None:
    run = Run(**fields)
    run.begin()
    if run.course.wants_losses:
        run.train(losses)
    assert run.reason() is reason


def test_a_divergence_names_step_rank_and_tensor_once_all_ranks_have_told_the_step() -> None:
    run = Run(stop_when=["diverged"])
    run.begin()
    run.tell(found(8), rank=0)
    run.train(flat(7))
    assert run.reason() is None
    run.tell(found(8, NonFinitePlace.ACTIVATION, "layers.1"), rank=1)
    run.train([math.nan])
    assert run.course.ruling() == Ruling(
        Reason.DIVERGED,
        "Diverged: the loss is nan at step 8, the first that is not finite. It began in the output of layers.1, "
        "on rank 1. Lower the learning rate or warm it up, and look at the images of that step.",
    )


def test_the_target_counts_when_the_next_two_evaluations_confirm_it() -> None:
    run = Run(stop_when=["target"], target={"value": 0.9})
    run.begin()
    for step, accuracy in ((10, 0.95), (20, 0.85), (30, 0.92), (40, 0.93)):
        run.tell(evaluation(step, accuracy=accuracy))
    assert run.reason() is None
    run.tell(evaluation(50, accuracy=0.9))
    ruling = run.course.ruling()
    assert ruling is not None
    assert ruling.reason is Reason.TARGET_REACHED
    assert ruling.detail == "Reached accuracy 0.9 after step 30, 1920 images; the next 2 evaluations confirm it."


def test_a_target_without_the_rule_stops_nothing() -> None:
    run = Run(target={"value": 0.9}, drift_limits=[{"above": 0.2, "action": "alert"}])
    run.begin()
    for step in (10, 20, 30):
        run.tell(evaluation(step, accuracy=0.99))
        run.tell(exceeded(step, action=LimitAction.ALERT))
    assert run.reason() is None
    assert not has_rules(JobSpec(name="t", epochs=1))


def test_what_an_attempt_told_of_steps_that_the_next_one_repeats_counts_no_more() -> None:
    run = Run(stop_when=["diverged", "target"], target={"value": 0.9})
    run.begin()
    run.tell(evaluation(40, accuracy=0.95))
    run.tell(evaluation(60, accuracy=0.95))
    run.tell(found(61, NonFinitePlace.LOSS))
    run.train([*flat(60), math.nan])
    assert run.reason() is Reason.DIVERGED
    run.begin(resumed_step=50)
    assert run.course.last_step == 50
    assert run.reason() is None
    run.train(flat(30, seed=1))
    run.tell(evaluation(60, accuracy=0.5))
    run.tell(evaluation(70, accuracy=0.95))
    run.tell(evaluation(80, accuracy=0.95))
    assert run.reason() is None
    run.tell(evaluation(90, accuracy=0.95))
    assert run.reason() is Reason.TARGET_REACHED


def test_a_limit_pauses_once_an_attempt_and_again_when_a_new_sample_says_so() -> None:
    run = Run(drift_limits=[{"above": 0.2, "action": "pause"}])
    run.begin()
    run.tell(exceeded(30, "bn.1", LimitAction.ALERT))
    assert run.reason() is None
    run.tell(exceeded(30, "bn.2"))
    run.tell(exceeded(30, "bn.3"))
    sentence = "Layer bn.2: rms_mean_shift 0.25 is above its limit of 0.2 at step 30 (and 1 more)."
    assert run.course.ruling() == Ruling(Reason.DRIFT_LIMIT, sentence)
    run.begin(resumed_step=32)
    run.tell(exceeded(30, "bn.4"), attempt=1)  # told late
    assert run.reason() is None
    run.tell(exceeded(60))
    assert run.reason() is Reason.DRIFT_LIMIT


def test_the_gravest_of_what_holds_is_what_follows() -> None:
    run = Run(
        stop_when=["diverged", "plateau", "target"],
        target={"value": 0.9},
        drift_limits=[{"above": 0.2, "action": "pause"}],
    )
    run.begin()
    run.tell(exceeded(30))
    run.train(flat(1000))
    assert run.reason() is Reason.PLATEAU_REACHED
    for step in (100, 200, 300):
        run.tell(evaluation(step, accuracy=0.95))
    assert run.reason() is Reason.TARGET_REACHED
    run.train([math.inf])
    assert run.reason() is Reason.DIVERGED
