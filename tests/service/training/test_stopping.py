"""A run that is told to stop, moved to other workers and taken up again is still the same run."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from service.jobs import (
    CheckpointSaved,
    Evaluation,
    JobSpec,
    LogLine,
    RankStarted,
    ResumeCertificate,
    StoppedEarly,
    TelemetryEvent,
    TrainingFinished,
)
from service.training.checkpoint import UnusableCheckpoint, checkpoint_path, latest_checkpoint
from service.training.loop import Orders, train
from tests.ranks import RankFailed, run_ranks
from tests.service.training.runs import assert_equal, last_checkpoint, losses, of, own_context, tiny_spec


class Asked:
    """What a rank hears each time it asks: one answer after the other, the last one for ever."""

    def __init__(self, *answers: Orders) -> None:
        self._answers: Iterator[Orders] = iter(answers)
        self._last = Orders()

    def __call__(self) -> Orders:
        self._last = next(self._answers, self._last)
        return self._last


STOP_AT_THE_SECOND = (Orders(), Orders(stop=True))
STOP_AT_THE_THIRD = (Orders(), *STOP_AT_THE_SECOND)


def _train(
    spec: JobSpec, storage: Path, answers: tuple[Orders, ...] = (), start: Path | None = None
) -> list[TelemetryEvent]:
    return list(train(spec, own_context(storage, start), Asked(*answers)))


def _on(num_workers: int, spec: JobSpec) -> JobSpec:
    """The same job with its global batch dealt out to ``num_workers``."""
    batch_size = spec.global_batch_size // num_workers
    return spec.model_copy(update={"num_workers": num_workers, "batch_size_per_worker": batch_size})


def _stopped_step(ranks: list[list[TelemetryEvent]]) -> int:
    stops = [of(StoppedEarly, events) for events in ranks]
    assert all(len(stop) == 1 for stop in stops)
    assert len({stop[0] for stop in stops}) == 1
    assert all(stop[0].checkpoint_saved for stop in stops)
    assert not any(of(TrainingFinished, events) for events in ranks)
    return stops[0][0].step


def _mean_losses(ranks: list[list[TelemetryEvent]]) -> dict[int, float]:
    """Of equal shares of the global batch the mean is the loss of the whole."""
    steps = losses(ranks[0])
    return {step: math.fsum(losses(events)[step] for events in ranks) / len(ranks) for step in steps}


@pytest.mark.parametrize(
    ("normalization", "optimizer"),
    [
        ("sync", {"name": "sgd", "learning_rate": 0.1, "nesterov": True}),
        ("local", {"name": "adamw", "learning_rate": 0.01}),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, normalization: str, optimizer: dict[str, Any]) -> None:
    schedule = {"name": "cosine", "warmup_steps": 7}
    spec = tiny_spec(tmp_path, normalization=normalization, optimizer=optimizer, schedule=schedule)
    straight = run_ranks(2, _train, spec, tmp_path / "straight")
    first = run_ranks(2, _train, spec, tmp_path / "stopped", STOP_AT_THE_THIRD)
    step = _stopped_step(first)
    assert 3 <= step <= 7
    assert of(CheckpointSaved, first[0])[-1].step == last_checkpoint(tmp_path / "stopped").step == step
    second = run_ranks(2, _train, spec, tmp_path / "stopped")
    for rank in range(2):
        assert of(RankStarted, second[rank])[0].resumed_step == step
        assert losses(first[rank]) | losses(second[rank]) == losses(straight[rank])
        assert len(losses(first[rank])) == step
    assert of(Evaluation, first[0]) + of(Evaluation, second[0]) == of(Evaluation, straight[0])
    assert_equal(last_checkpoint(tmp_path / "stopped"), last_checkpoint(tmp_path / "straight"))
    (certificate,) = of(ResumeCertificate, second[0])
    assert (certificate.exact, certificate.step, certificate.saved_by_num_workers) == (True, step, 2)
    assert math.isfinite(certificate.saved_probe_loss)
    assert not of(ResumeCertificate, second[1])
    assert not [line for line in of(LogLine, second[0]) if line.level != "info"]


def test_a_run_that_moves_to_fewer_and_to_more_workers_keeps_its_losses(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, precision="float64")
    straight = _mean_losses(run_ranks(2, _train, spec, tmp_path / "straight"))
    moved: dict[int, float] = {}
    for num_workers, answers in ((2, STOP_AT_THE_THIRD), (1, STOP_AT_THE_SECOND), (4, ())):
        ranks = run_ranks(num_workers, _train, _on(num_workers, spec), tmp_path / "moved", answers)
        moved |= _mean_losses(ranks)
        if num_workers < 4:
            before, step = num_workers, _stopped_step(ranks)
            continue
        (certificate,) = of(ResumeCertificate, ranks[0])
        assert (certificate.step, certificate.saved_by_num_workers, certificate.num_workers) == (step, before, 4)
        assert certificate.exact
    assert moved.keys() == straight.keys()
    for each, loss in straight.items():
        assert moved[each] == pytest.approx(loss, rel=1e-9), f"step {each}"
    together = last_checkpoint(tmp_path / "moved")
    for name, value in last_checkpoint(tmp_path / "straight").model.items():
        torch.testing.assert_close(together.model[name], value, rtol=1e-9, atol=1e-11)
    assert len({state.numpy().tobytes() for state in together.rng_states}) == 4  # new ranks draw numbers of their own


def test_local_normalization_on_other_workers_is_told_to_be_another_run(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, normalization="local")
    run_ranks(2, _train, spec, tmp_path / "job", STOP_AT_THE_THIRD)
    (events,) = run_ranks(1, _train, _on(1, spec), tmp_path / "job")
    (warning,) = [line.text for line in of(LogLine, events) if line.level == "warning"]
    assert "saved by 2 workers, resumed by 1" in warning
    assert "over 8 images instead of 4" in warning


def test_a_request_is_met_once_by_all_ranks_and_over_attempts(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, cadence={"checkpoint_every_steps": 10**6})
    one, two = Orders(checkpoint_requests=1), Orders(checkpoint_requests=2)
    leading, _ = run_ranks(2, _train, spec, tmp_path / "job", (Orders(), one, one, one))
    on_request, at_the_end = of(CheckpointSaved, leading)
    assert 2 <= on_request.step <= 3
    assert at_the_end.step == 14
    checkpoint_path(tmp_path / "job" / "checkpoints", 14).unlink()  # an attempt that was lost before its end
    leading, _ = run_ranks(2, _train, spec, tmp_path / "job", (one, two))
    assert of(RankStarted, leading)[0].resumed_step == on_request.step
    second, at_the_end = of(CheckpointSaved, leading)
    assert on_request.step + 2 <= second.step <= on_request.step + 3  # the second time it asked, not the first
    assert last_checkpoint(tmp_path / "job").requests_met == 2


def test_a_run_told_to_stop_at_its_last_step_has_finished(tmp_path: Path) -> None:
    events = _train(tiny_spec(tmp_path, num_workers=1, max_steps=1), tmp_path, (Orders(stop=True),))
    assert isinstance(events[-1], TrainingFinished)
    assert not of(StoppedEarly, events)


def test_a_run_that_cannot_save_does_not_say_that_it_has_stopped(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    told = r"CheckpointFailed.*checkpoint of step 1 cannot be written.*make room there and retry"
    with pytest.raises(RankFailed, match=told) as caught:
        run_ranks(2, _train, tiny_spec(tmp_path), tmp_path, (Orders(stop=True),))
    assert caught.value.rank == 0


@pytest.mark.parametrize(
    ("name", "part"), [("linear2.weight", "parameters"), ("norm1.running_var", "running statistics")]
)
def test_an_altered_checkpoint_with_a_right_checksum_is_told(tmp_path: Path, name: str, part: str) -> None:
    spec = tiny_spec(tmp_path, num_workers=1)
    _train(spec, tmp_path, STOP_AT_THE_THIRD)
    path = checkpoint_path(tmp_path / "checkpoints", last_checkpoint(tmp_path).step)
    content = torch.load(path, weights_only=True)
    values = content["model"][name].flatten()
    values[0] = torch.nextafter(values[0], torch.tensor(math.inf))  # the last bit of one number
    torch.save(content, path)
    manifest = json.loads(path.with_suffix(".json").read_text())
    manifest |= {"size_bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(manifest))
    again = _train(spec, tmp_path)
    (certificate,) = of(ResumeCertificate, again)
    assert not certificate.exact
    same_parameters = certificate.saved_parameters_sha256 == certificate.restored_parameters_sha256
    same_statistics = certificate.saved_statistics_sha256 == certificate.restored_statistics_sha256
    assert (same_parameters, same_statistics) == (part != "parameters", part == "parameters")
    (error,) = [line.text for line in of(LogLine, again) if line.level == "error"]
    assert f"the {part} in the checkpoint of step {certificate.step} are not those that were saved" in error


def test_a_run_that_diverged_has_a_proof_too(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, num_workers=1, optimizer={"name": "sgd", "learning_rate": 1e30})
    _train(spec, tmp_path)
    proof = last_checkpoint(tmp_path).proof
    assert proof is not None
    assert not math.isfinite(proof.probe_loss)
    (certificate,) = of(ResumeCertificate, _train(spec, tmp_path))
    assert certificate.exact


def test_a_job_begins_where_another_has_saved(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, num_workers=1)
    straight = _train(spec, tmp_path / "straight")
    _train(spec, tmp_path / "first", (Orders(), Orders(stop=True, checkpoint_requests=3)))
    saved = last_checkpoint(tmp_path / "first")
    start = checkpoint_path(tmp_path / "first" / "checkpoints", saved.step)
    assert saved.requests_met == 3
    renamed = spec.model_copy(update={"name": "another"})
    second = _train(renamed, tmp_path / "second", STOP_AT_THE_THIRD, start)
    assert of(RankStarted, second)[0].resumed_step == saved.step
    assert of(ResumeCertificate, second)[0].exact
    assert last_checkpoint(tmp_path / "second").requests_met == 0  # the other job's requests are not this one's
    third = _train(renamed, tmp_path / "second", (), start)  # its own checkpoint goes before the other job's
    assert of(RankStarted, third)[0].resumed_step == of(StoppedEarly, second)[0].step
    expected = losses(straight)
    assert losses(second) | losses(third) == {step: expected[step] for step in range(saved.step + 1, 15)}


def test_a_start_checkpoint_of_other_numbers_or_none_is_refused(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, num_workers=1)
    _train(spec, tmp_path / "first")
    start = checkpoint_path(tmp_path / "first" / "checkpoints", 14)
    with pytest.raises(UnusableCheckpoint, match=r"start checkpoint .* belongs to a job with other numbers"):
        _train(spec.model_copy(update={"seed": 1}), tmp_path / "second", (), start)
    with pytest.raises(UnusableCheckpoint, match=r"start checkpoint .*nothing.pt cannot be used"):
        _train(spec, tmp_path / "second", (), tmp_path / "nothing.pt")
    assert latest_checkpoint(tmp_path / "second" / "checkpoints").checkpoint is None
