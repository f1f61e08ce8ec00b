"""Steps that a lost attempt had measured and saved, and not told, are told by the next one."""

import math
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import pytest
import torch.distributed as dist

from service.cluster.retelling import StepRecord, retelling
from service.jobs import JobSpec, LogLine, RankStarted, StepMetrics, TelemetryEvent
from service.training.loop import train
from tests.ranks import run_ranks
from tests.service.store.telling import started, step
from tests.service.training.runs import losses, of, own_context, tiny_spec


def _attempt(spec: JobSpec, storage: Path, told_step: int | None, last_step: int) -> list[TelemetryEvent]:
    """What this rank tells until it is lost after ``last_step``."""
    context = replace(own_context(storage), told_step=told_step)
    events = retelling(train(spec, context), context)
    return list(takewhile(lambda event: not (isinstance(event, StepMetrics) and event.step > last_step), events))


def _story(spec: JobSpec, folder: Path) -> list[list[TelemetryEvent]]:
    """A whole run, and one whose first attempt is lost after step 12 having told 3, with checkpoints of 5 and 10."""
    whole = _attempt(spec, folder / "whole", None, 100)
    lost = _attempt(spec, folder / "lost", None, 12)
    lost_again = _attempt(spec, folder / "lost", 3, 10)  # and once more, before anybody has heard of that
    last = _attempt(spec, folder / "lost", 3, 100)
    if dist.get_rank() == 1:
        (folder / "lost" / "steps" / "rank-00001.bin").unlink()
    return [whole, lost, lost_again, last, _attempt(spec, folder / "lost", 3, 100)]


def test_what_was_saved_and_not_told_is_told_by_the_next_attempt(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path)
    for whole, lost, lost_again, last, without in run_ranks(2, _story, spec, tmp_path):
        assert of(RankStarted, lost)[0].resumed_step == 0
        for events in (lost_again, last):
            (begun,) = of(RankStarted, events)
            before = losses(events[: events.index(begun)])
            assert (begun.resumed_step, list(before)) == (10, list(range(4, 11)))  # told before it says that it began
        assert [event.step for event in of(StepMetrics, last)] == list(range(4, 15))
        expected = losses(whole)
        assert losses(last) == {number: expected[number] for number in range(4, 15)}  # bit for bit
        # Of rank 1 nothing is there; if rank 0 told its own again, the service would forget what rank 1 has told.
        resumed_step = of(RankStarted, without)[0].resumed_step
        assert resumed_step >= 10
        assert [event.step for event in of(StepMetrics, without)] == list(range(resumed_step + 1, 15))


def test_a_record_keeps_every_number_and_no_more_than_it_shall(tmp_path: Path) -> None:
    record = StepRecord(tmp_path / "steps" / "rank.bin", max_steps=4)
    record.begin([])
    strange = [math.nan, math.inf, -math.inf, 0.1 + 0.2, 5e-324]
    for number, loss in enumerate(strange, start=1):
        record.add(step(number, loss=loss))
    assert [repr(each.loss) for each in record.between(0, 5)] == [repr(loss) for loss in strange]
    assert [each.step for each in record.between(2, 4)] == [3, 4]
    assert record.between(0, 6) == []
    for number in range(6, 9):
        record.add(step(number))
    assert [each.step for each in record.between(0, 8)] == [5, 6, 7, 8]
    record.add(step(7, loss=7.5))
    record.close()
    with (tmp_path / "steps" / "rank.bin").open("ab") as file:
        file.write(b"cut off")
    again = StepRecord(tmp_path / "steps" / "rank.bin")
    assert [each.loss for each in again.between(5, 8)] == [1.0, 7.5, 1.0]


@pytest.mark.parametrize("told_step", [None, 0])
def test_a_disk_that_takes_no_record_does_not_stop_the_training(tmp_path: Path, told_step: int | None) -> None:
    (tmp_path / "steps").touch()  # where the folder should be
    events: list[TelemetryEvent] = [started(resumed_step=2), step(3), step(4)]
    context = replace(own_context(tmp_path), told_step=told_step)
    told = list(retelling(events, context))
    assert [event for event in told if not isinstance(event, LogLine)] == events
    assert len(of(LogLine, told)) == 1
