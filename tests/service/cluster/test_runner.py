"""Attempts on a real Ray head, from launch to their last word, and everything that may befall them."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from service.cluster.head import LocalRayHead
from service.cluster.launcher import RayLauncher
from service.jobs import (
    RUNNER,
    Cadence,
    CheckpointSaved,
    Control,
    JobSpec,
    LaunchRequest,
    LogLine,
    Mlp,
    Outcome,
    Phase,
    PhaseChanged,
    RankStarted,
    Reason,
    StepMetrics,
    StoppedEarly,
    TrainingFinished,
    new_job_id,
)
from service.scheduler.launcher import LaunchState
from service.training.checkpoint import checkpoint_path, latest_checkpoint
from tests.service.cluster.receiver import Receiver, receiving
from tests.service.cluster.waiting import is_gone, wait_until

STARTS_S = 60.0  # what a loaded machine may take to import torch in every rank


@dataclass
class Stage:
    """Where attempts run and report."""

    launcher: RayLauncher
    receiver: Receiver
    storage: Path
    images: Path

    def launch(self, start_checkpoint: str | None = None, **changes: Any) -> LaunchRequest:
        """Start an attempt of a small job, which would train for very long if nothing else is said."""
        quiet = Cadence(evaluate_every_steps=10**6, drift_every_steps=10**6, checkpoint_every_steps=10**6)
        fields: dict[str, Any] = {
            "name": "small",
            "model": Mlp(hidden_sizes=(16,)),
            "max_steps": 10**6,
            "cadence": quiet,
        }
        request = LaunchRequest(
            job_id=new_job_id(),
            attempt=1,
            spec=JobSpec(**(fields | changes)),
            ingest_url=self.receiver.url,
            storage=str(self.storage),
            start_checkpoint=start_checkpoint,
        )
        self.launcher.launch(request, self.receiver.token)
        return request

    def pids(self) -> dict[int, int]:
        """Process of each rank, once all train."""
        self.receiver.wait_for(lambda: len({r for r in (0, 1) if self.receiver.of_type(StepMetrics, r)}) == 2, STARTS_S)
        return {rank: self.receiver.of_type(RankStarted, rank)[0].pid for rank in (0, 1)}

    def ends(self, request: LaunchRequest, timeout_s: float = 30.0) -> LaunchState:
        """What Ray says of the attempt once it is over."""
        wait_until(lambda: self.launcher.observe(request.attempt_id).state.over, timeout_s, "the attempt's end on Ray")
        return self.launcher.observe(request.attempt_id).state


@pytest.fixture
def stage(ray_head: LocalRayHead, images: Path, tmp_path: Path) -> Iterator[Stage]:
    with receiving() as receiver:
        yield Stage(RayLauncher(ray_head.connect), receiver, tmp_path, images)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in MNIST's format: noise, 4 x 4, 10 classes. Loads faster than scikit-learn's digits."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, count in (("train", 256), ("t10k", 64)):
        pixels = rng.integers(0, 256, (count, 4, 4), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for name, array in ((f"{part}-images-idx3-ubyte", pixels), (f"{part}-labels-idx1-ubyte", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
            (folder / name).write_bytes(header + array.tobytes())
    return folder


def test_a_job_runs_and_reports_every_step_of_every_rank_once(stage: Stage) -> None:
    request = stage.launch(max_steps=20, data="builtin:digits")
    stage.launcher.launch(request, stage.receiver.token)  # asked again: adopted, not started twice
    ended = stage.receiver.wait_for(lambda: stage.receiver.ended, STARTS_S)
    assert (ended.outcome, ended.reason) == (Outcome.SUCCEEDED, None)
    for rank in (0, 1):
        assert [event.step for event in stage.receiver.of_type(StepMetrics, rank)] == list(range(1, 21))
        assert len(stage.receiver.of_type(TrainingFinished, rank)) == 1
        assert stage.receiver.times[rank] == sorted(stage.receiver.times[rank])
    phases = [event.phase for event in stage.receiver.of_type(PhaseChanged, RUNNER)]
    assert phases == [Phase.PLACING, Phase.RENDEZVOUS]
    assert stage.receiver.order[-1] == (RUNNER, ended)
    (saved,) = stage.receiver.of_type(CheckpointSaved)
    assert Path(saved.path).is_file()
    assert stage.ends(request) is LaunchState.SUCCEEDED
    assert '"outcome":"succeeded"' in stage.launcher.output(request.attempt_id)
    assert not (stage.storage / "attempts").exists()  # no spool was needed, none is left


def test_a_service_that_is_away_for_a_while_misses_nothing(stage: Stage) -> None:
    request = stage.launch(max_steps=400)
    stage.receiver.wait_for(lambda: stage.receiver.of_type(StepMetrics), STARTS_S)
    stage.receiver.away = True
    stage.receiver.wait_for(lambda: stage.receiver.num_refused >= 3, 20)
    stage.receiver.away = False
    assert stage.receiver.wait_for(lambda: stage.receiver.ended, STARTS_S).outcome is Outcome.SUCCEEDED
    for rank in (0, 1):
        assert [event.step for event in stage.receiver.of_type(StepMetrics, rank)] == list(range(1, 401))
    assert stage.ends(request) is LaunchState.SUCCEEDED


def test_a_killed_rank_is_named_at_once_and_takes_the_others_along(stage: Stage) -> None:
    request = stage.launch()
    pids = stage.pids()
    os.kill(pids[1], signal.SIGKILL)
    killed_at = time.time()
    ended = stage.receiver.wait_for(lambda: stage.receiver.ended, 20)
    assert (ended.outcome, ended.reason) == (Outcome.FAILED, Reason.WORKER_LOST)
    assert ended.detail.startswith("rank 1 on ")
    assert f"pid {pids[1]}" in ended.detail
    assert stage.receiver.times[RUNNER][-1] - killed_at < 10
    assert stage.ends(request) is LaunchState.FAILED
    wait_until(lambda: is_gone(pids[0]), 10, "the end of rank 0")


def test_a_frozen_rank_ends_the_attempt_and_is_named(stage: Stage) -> None:
    request = stage.launch(timeouts={"collective_s": 60, "heartbeat_s": 4})
    pids = stage.pids()
    os.kill(pids[1], signal.SIGSTOP)
    ended = stage.receiver.wait_for(lambda: stage.receiver.ended, 30)
    assert (ended.outcome, ended.reason) == (Outcome.FAILED, Reason.NO_HEARTBEAT)
    assert f"pid {pids[1]}" in ended.detail
    assert f"pid {pids[0]}" not in ended.detail
    assert stage.ends(request) is LaunchState.FAILED
    wait_until(lambda: all(is_gone(pid) for pid in pids.values()), 10, "the end of both ranks")


def test_a_collective_that_hangs_times_out_and_the_silent_rank_is_named(stage: Stage) -> None:
    request = stage.launch(timeouts={"collective_s": 5, "heartbeat_s": 60})
    pids = stage.pids()
    os.kill(pids[1], signal.SIGSTOP)
    ended = stage.receiver.wait_for(lambda: stage.receiver.ended, 40)
    assert (ended.outcome, ended.reason) == (Outcome.FAILED, Reason.COLLECTIVE_TIMEOUT)
    assert ended.detail.startswith("rank 0 on ")
    assert f"pid {pids[1]} had stopped answering" in ended.detail
    assert stage.ends(request) is LaunchState.FAILED
    wait_until(lambda: all(is_gone(pid) for pid in pids.values()), 10, "the end of both ranks")


def test_an_attempt_saves_when_asked_and_when_it_is_stopped(stage: Stage) -> None:
    request = stage.launch()
    pids = stage.pids()
    assert {psutil.Process(pid).nice() for pid in pids.values()} == {psutil.Process().nice()}
    stage.receiver.checkpoint_requests = 1
    on_request = stage.receiver.wait_for(lambda: stage.receiver.of_type(CheckpointSaved), 20)[0]
    assert latest_checkpoint(stage.storage / "checkpoints").checkpoint is not None
    stage.receiver.control = Control.STOP
    ended = stage.receiver.wait_for(lambda: stage.receiver.ended, 20)
    assert (ended.outcome, ended.reason) == (Outcome.STOPPED, None)
    assert ended.checkpoint_step > on_request.step
    for rank in (0, 1):
        (stopped,) = stage.receiver.of_type(StoppedEarly, rank)
        assert (stopped.step, stopped.checkpoint_saved) == (ended.checkpoint_step, True)
        assert [e.step for e in stage.receiver.of_type(StepMetrics, rank)] == list(range(1, stopped.step + 1))
    saved = latest_checkpoint(stage.storage / "checkpoints").checkpoint
    assert saved is not None
    assert (saved.step, saved.requests_met) == (ended.checkpoint_step, 1)
    assert stage.ends(request).over
    wait_until(lambda: all(is_gone(pid) for pid in pids.values()), 10, "the end of both ranks")


def test_an_attempt_that_ray_stops_saves_and_leaves_no_rank(stage: Stage) -> None:
    request = stage.launch()
    pids = stage.pids()
    stage.launcher.stop(request.attempt_id)
    ended = stage.receiver.wait_for(lambda: stage.receiver.ended, 20)
    assert (ended.outcome, ended.reason) == (Outcome.STOPPED, None)
    assert ended.detail == f"stopped by Ray with SIGTERM; saved a checkpoint at step {ended.checkpoint_step}"
    assert checkpoint_path(stage.storage / "checkpoints", ended.checkpoint_step).is_file()
    assert stage.ends(request) is LaunchState.STOPPED
    wait_until(lambda: all(is_gone(pid) for pid in pids.values()), 10, "the end of both ranks")


def test_the_services_word_ends_an_attempt(stage: Stage) -> None:
    request = stage.launch()
    pids = stage.pids()
    stage.receiver.control = Control.ABORT
    ended = stage.receiver.wait_for(lambda: stage.receiver.ended, 20)
    assert (ended.outcome, ended.detail) == (Outcome.STOPPED, "stopped by the service")
    assert stage.ends(request).over
    wait_until(lambda: all(is_gone(pid) for pid in pids.values()), 10, "the end of both ranks")


def test_an_error_in_training_comes_home_with_its_traceback(stage: Stage) -> None:
    request = stage.launch(data="idx:/nowhere/at/all")
    ended = stage.receiver.wait_for(lambda: stage.receiver.ended, STARTS_S)
    assert (ended.outcome, ended.reason) == (Outcome.FAILED, Reason.TRAINING_ERROR)
    assert "FileNotFoundError: /nowhere/at/all" in ended.detail
    told = [line.text for line in stage.receiver.of_type(LogLine) if line.level == "error"]
    assert "Traceback (most recent call last):" in told
    assert stage.ends(request) is LaunchState.FAILED


def test_a_start_checkpoint_that_is_not_there_is_named(stage: Stage) -> None:
    stage.launch(start_checkpoint="/nowhere/step-00000001.pt", num_workers=1)
    ended = stage.receiver.wait_for(lambda: stage.receiver.ended, STARTS_S)
    assert (ended.outcome, ended.reason) == (Outcome.FAILED, Reason.CHECKPOINT_UNUSABLE)
    assert "/nowhere/step-00000001.pt" in ended.detail


def test_a_job_without_room_is_told_so(stage: Stage) -> None:
    request = stage.launch(num_workers=5, timeouts={"placement_s": 1})
    ended = stage.receiver.wait_for(lambda: stage.receiver.ended, STARTS_S)
    assert (ended.outcome, ended.reason) == (Outcome.FAILED, Reason.PLACEMENT_TIMEOUT)
    assert "timeouts.placement_s" in ended.detail
    assert stage.ends(request) is LaunchState.FAILED


def test_an_attempt_told_to_stop_before_its_ranks_begin_ends_at_once(stage: Stage) -> None:
    stage.receiver.control = Control.STOP
    request = stage.launch(num_workers=5)  # there is room for four
    ended = stage.receiver.wait_for(lambda: stage.receiver.ended, STARTS_S)
    assert (ended.outcome, ended.reason, ended.checkpoint_step) == (Outcome.STOPPED, None, None)
    assert "before any rank had begun" in ended.detail
    assert stage.ends(request).over


def test_a_killed_runner_takes_its_ranks_along(stage: Stage) -> None:
    request = stage.launch()
    pids = stage.pids()
    os.kill(runner_of(request), signal.SIGKILL)
    assert stage.ends(request) is LaunchState.FAILED
    wait_until(lambda: all(is_gone(pid) for pid in pids.values()), 20, "the end of both ranks")
    assert stage.receiver.ended is None


def test_a_runner_without_its_supervisor_leaves_by_itself(stage: Stage) -> None:
    request = stage.launch()
    pids = stage.pids()
    runner = runner_of(request)
    os.kill(psutil.Process(runner).ppid(), signal.SIGKILL)
    wait_until(lambda: all(is_gone(pid) for pid in (runner, *pids.values())), 30, "the end of runner and ranks")
    assert stage.ends(request, 60) is LaunchState.FAILED


def runner_of(request: LaunchRequest) -> int:
    """The process of an attempt's runner: the one that runs the module with this attempt in its environment."""
    for process in psutil.process_iter():
        try:
            if "service.cluster.runner" in process.cmdline() and request.job_id in process.environ()["SYNCBN_RUN"]:
                return process.pid
        except (psutil.Error, KeyError):
            continue
    raise AssertionError(f"no runner of {request.attempt_id}")
