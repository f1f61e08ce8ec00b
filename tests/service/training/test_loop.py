import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from service.jobs import (
    CheckpointSaved,
    Drift,
    Evaluation,
    JobSpec,
    LogLine,
    Phase,
    PhaseChanged,
    RankStarted,
    StepMetrics,
    TelemetryEvent,
    TrainingFinished,
)
from service.training.checkpoint import UnusableCheckpoint
from service.training.loop import RankContext, train
from tests.ranks import RankFailed, run_ranks
from tests.service.training.runs import CPU, assert_equal, last_checkpoint, losses, of, own_context, tiny_spec


def _train(spec: JobSpec, storage: Path, until: int | None = None) -> list[TelemetryEvent]:
    """Train as the rank this process is; with ``until``, leave as soon as that step has been told in full."""
    events = train(spec, own_context(storage))
    if until is None:
        return list(events)
    return list(itertools.takewhile(lambda e: not (isinstance(e, StepMetrics) and e.step > until), events))


def test_every_rank_tells_every_step_and_rank_zero_what_concerns_all(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path)
    leading, other = run_ranks(2, _train, spec, tmp_path / "job")
    for events in (leading, other):
        (start,) = of(RankStarted, events)
        assert (start.world_size, start.resumed_step, start.total_steps, start.steps_per_epoch) == (2, 0, 14, 6)
        assert (start.num_train_images, start.num_validation_images, start.num_classes) == (48, 21, 3)
        assert start.num_parameters == 36 * 8 + 16 + 8 * 8 + 16 + 8 * 3 + 3
        steps = of(StepMetrics, events)
        assert [event.step for event in steps] == list(range(1, 15))
        assert [event.epoch for event in steps] == [1] * 6 + [2] * 6 + [3] * 2
        assert isinstance(events[-1], TrainingFinished)
    assert {type(event) for event in other} == {RankStarted, StepMetrics, TrainingFinished}
    assert [(e.step, e.epoch) for e in of(Evaluation, leading)] == [(6, 1), (12, 2), (14, 3)]
    assert [event.step for event in of(Drift, leading)] == [6, 12, 14]
    assert [event.step for event in of(CheckpointSaved, leading)] == [5, 10, 14]
    assert [layer.layer for layer in of(Drift, leading)[0].layers] == ["norm1", "norm2"]
    assert sum("validation loss" in line.text for line in of(LogLine, leading)) == 3
    phases = [event.phase for event in of(PhaseChanged, leading)]
    assert phases[:5] == [Phase.LOADING, Phase.TRAINING, Phase.CHECKPOINTING, Phase.TRAINING, Phase.VALIDATING]
    assert phases[-2:] == [Phase.VALIDATING, Phase.CHECKPOINTING]


def test_each_cadence_is_kept_by_itself(tmp_path: Path) -> None:
    cadence = {"evaluate_every_steps": 7, "drift_every_steps": 4, "checkpoint_every_steps": 9}
    (events,) = run_ranks(1, _train, tiny_spec(tmp_path, num_workers=1, cadence=cadence), tmp_path / "job")
    assert [event.step for event in of(Evaluation, events)] == [7, 14]
    assert [event.step for event in of(Drift, events)] == [4, 8, 12, 14]
    assert [event.step for event in of(CheckpointSaved, events)] == [9, 14]


@pytest.mark.parametrize("model", [{"name": "mlp"}, {"name": "resnet20", "width": 2}])
def test_two_synchronized_ranks_train_as_one_rank_with_the_joined_batch(tmp_path: Path, model: dict[str, str]) -> None:
    common = {"model": model, "precision": "float64", "max_steps": 8}
    alone = _train(tiny_spec(tmp_path, num_workers=1, batch_size_per_worker=8, **common), tmp_path / "alone")
    ranks = run_ranks(2, _train, tiny_spec(tmp_path, **common), tmp_path / "together")
    expected = losses(alone)
    for step, (first, second) in enumerate(zip(*(losses(rank).values() for rank in ranks), strict=True), start=1):
        assert (first + second) / 2 == pytest.approx(expected[step], rel=1e-9)
    together = last_checkpoint(tmp_path / "together").model
    for name, value in last_checkpoint(tmp_path / "alone").model.items():
        torch.testing.assert_close(together[name], value, rtol=1e-9, atol=1e-11)
    drift = of(Drift, ranks[0])[-1]
    assert [layer.rank_disagreement for layer in drift.layers] == [0.0] * len(drift.layers)


def test_local_statistics_differ_from_synchronized_ones_and_the_ranks_disagree(tmp_path: Path) -> None:
    sync, local = (
        run_ranks(2, _train, tiny_spec(tmp_path, normalization=normalization), tmp_path / normalization)[0]
        for normalization in ("sync", "local")
    )
    assert losses(sync)[1] != losses(local)[1]
    assert all(layer.rank_disagreement > 0 for layer in of(Drift, local)[-1].layers)


@pytest.mark.parametrize("normalization", ["sync", "local"])
@pytest.mark.parametrize(
    "optimizer", [{"name": "sgd", "learning_rate": 0.1, "nesterov": True}, {"name": "adamw", "learning_rate": 0.01}]
)
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, normalization: str, optimizer: dict[str, Any]) -> None:
    schedule = {"name": "cosine", "warmup_steps": 7}
    spec = tiny_spec(tmp_path, normalization=normalization, optimizer=optimizer, schedule=schedule)
    straight = run_ranks(2, _train, spec, tmp_path / "straight")
    first = run_ranks(2, _train, spec, tmp_path / "broken", 7)
    second = run_ranks(2, _train, spec, tmp_path / "broken")
    for rank in range(2):
        assert of(RankStarted, second[rank])[0].resumed_step == 5
        expected = losses(straight[rank])
        assert losses(first[rank]) == {step: expected[step] for step in range(1, 8)}
        assert losses(second[rank]) == {step: expected[step] for step in range(6, 15)}
    assert of(Evaluation, second[0]) == of(Evaluation, straight[0])
    assert of(Drift, second[0]) == of(Drift, straight[0])
    assert_equal(last_checkpoint(tmp_path / "broken"), last_checkpoint(tmp_path / "straight"))


def test_looking_at_the_model_does_not_change_the_training(tmp_path: Path) -> None:
    often = {"evaluate_every_steps": 1, "drift_every_steps": 1, "checkpoint_every_steps": 1}
    spec = tiny_spec(tmp_path, normalization="local")
    looking = spec.model_copy(update={"cadence": tiny_spec(tmp_path, cadence=often).cadence})
    seldom = run_ranks(2, _train, spec, tmp_path / "seldom")
    watched = run_ranks(2, _train, looking, tmp_path / "watched")
    assert [losses(rank) for rank in watched] == [losses(rank) for rank in seldom]
    assert_equal(last_checkpoint(tmp_path / "watched"), last_checkpoint(tmp_path / "seldom"))


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, num_workers=1)
    straight = _train(spec, tmp_path)
    newest = Path(of(CheckpointSaved, straight)[-1].path)
    os.truncate(newest, 100)
    again = _train(spec, tmp_path)
    assert of(RankStarted, again)[0].resumed_step == 10
    warning, attempt, *_ = of(LogLine, again)
    assert warning.level == "warning"
    assert "step-00000014.pt: 100 bytes" in warning.text
    assert attempt.text == "attempt 1 goes on after step 10, 14 steps in all"
    assert losses(again) == {step: loss for step, loss in losses(straight).items() if step > 10}


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, num_workers=1)
    _train(spec, tmp_path)
    again = _train(spec, tmp_path)
    assert of(RankStarted, again)[0].resumed_step == 14
    assert of(StepMetrics, again) == []
    assert isinstance(again[-1], TrainingFinished)


def test_the_checkpoints_of_another_job_are_refused_and_kept(tmp_path: Path) -> None:
    _train(tiny_spec(tmp_path, num_workers=1), tmp_path)
    with pytest.raises(UnusableCheckpoint, match="belong to a job with other numbers"):
        _train(tiny_spec(tmp_path, num_workers=1, seed=1), tmp_path)
    assert last_checkpoint(tmp_path).step == 14


def _train_in_a_folder_of_its_own(spec: JobSpec, storage: Path) -> list[TelemetryEvent]:
    return _train(spec, storage / str(dist.get_rank()))


def test_storage_that_the_ranks_do_not_share_is_refused(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path)
    run_ranks(2, _train_in_a_folder_of_its_own, spec, tmp_path)
    with pytest.raises(RankFailed, match="some ranks see a good checkpoint of step 14 and others none"):
        run_ranks(2, _train_in_a_folder_of_its_own, spec, tmp_path)


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run_unless_it_is_the_last(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    events: list[TelemetryEvent] = []
    with pytest.raises(OSError, match=r"checkpoint of step 14 cannot be written.*make room there and retry"):
        events.extend(train(tiny_spec(tmp_path, num_workers=1), RankContext(0, 1, CPU, tmp_path)))
    assert max(losses(events)) == 14
    errors = [line.text for line in of(LogLine, events) if line.level == "error"]
    assert [f"step {step} cannot be written" in text for step, text in zip((5, 10), errors, strict=True)] == [True] * 2


def test_a_diverging_run_reports_its_losses_to_the_end(tmp_path: Path) -> None:
    optimizer = {"name": "sgd", "learning_rate": 1e30}
    ranks = run_ranks(2, _train, tiny_spec(tmp_path, optimizer=optimizer), tmp_path / "job")
    for events in ranks:
        assert len(losses(events)) == 14
        assert not math.isfinite(losses(events)[14])
        assert isinstance(events[-1], TrainingFinished)
    assert not math.isfinite(of(Evaluation, ranks[0])[-1].stored.loss)


@pytest.mark.parametrize("normalization", ["sync", "local"])
@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_each_precision_learns_and_keeps_its_statistics(tmp_path: Path, normalization: str, precision: str) -> None:
    spec = tiny_spec(tmp_path, normalization=normalization, precision=precision, max_steps=40)
    events = run_ranks(2, _train, spec, tmp_path / "job")[0]
    by_step = losses(events)
    assert sum(by_step[step] for step in range(31, 41)) < 0.6 * sum(by_step[step] for step in range(1, 11))
    state = last_checkpoint(tmp_path / "job").model
    expected = torch.float64 if precision == "float64" else torch.float32
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {expected}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_workers": 2}, "asks for num_workers 2, and 1 started"),
        ({"num_workers": 1, "batch_size_per_worker": 64}, "has 48 images, fewer than one global batch of 64"),
        ({"num_workers": 1, "max_steps": None, "epochs": 1, "schedule": {"warmup_steps": 12}}, "has only 12 steps"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        _train(tiny_spec(tmp_path, **changes), tmp_path)


def test_a_rank_outside_its_world_is_refused() -> None:
    build: Callable[..., RankContext] = RankContext
    with pytest.raises(ValueError, match=r"rank 2 is not in 0\.\.1"):
        build(2, 2, CPU, Path("unused"))
