import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.jobs import (
    TELEMETRY_EVENT,
    Cadence,
    CheckpointSaved,
    Evaluation,
    JobSpec,
    RankStarted,
    StepMetrics,
    StoppedEarly,
    TrainingFinished,
)
from service.training.checkpoint import latest_checkpoint
from tests.service.training.idx_files import write_data_set

DEADLINE_S = 100.0


def _spec(tmp_path: Path, **changes: object) -> Path:
    fields = {"name": "tiny", "data": write_data_set(tmp_path / "images"), "batch_size_per_worker": 4, "max_steps": 3}
    path = tmp_path / "spec.json"
    path.write_text(JobSpec.model_validate(fields | changes).model_dump_json())
    return path


def _run(launcher: list[str], spec: Path, storage: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "-m", "service.training", str(spec), "--storage", str(storage)]
    environment = os.environ | {"TMPDIR": str(spec.parent)}  # torchrun leaves its log folder behind
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=DEADLINE_S, env=environment)


def test_two_ranks_under_torchrun_print_one_stream_of_events(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = _run(launcher, _spec(tmp_path, num_workers=2), tmp_path / "job")
    assert done.returncode == 0, done.stderr
    events = [TELEMETRY_EVENT.validate_json(line) for line in done.stdout.splitlines()]
    assert [event.world_size for event in events if isinstance(event, RankStarted)] == [2]
    assert [event.step for event in events if isinstance(event, StepMetrics)] == [1, 2, 3]
    assert [event.num_images for event in events if isinstance(event, Evaluation)] == [21]
    assert isinstance(events[-1], TrainingFinished)
    checkpoint = latest_checkpoint(tmp_path / "job" / "checkpoints").checkpoint
    assert checkpoint is not None
    assert checkpoint.step == 3


def test_a_process_alone_is_a_world_of_one(tmp_path: Path) -> None:
    done = _run([], _spec(tmp_path, num_workers=1), tmp_path / "job")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["type"] == "training_finished"


def test_a_process_that_is_terminated_saves_first(tmp_path: Path) -> None:
    spec = _spec(tmp_path, num_workers=1, max_steps=10**6, cadence=dict.fromkeys(Cadence.model_fields, 10**6))
    command = [sys.executable, "-m", "service.training", str(spec), "--storage", str(tmp_path / "job")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        while '"type":"step"' not in (line := process.stdout.readline()):
            assert line, "it ended before its first step"
        process.terminate()
        rest, _ = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.wait(DEADLINE_S)
    assert process.returncode == 3
    *_, saved, stopped = (TELEMETRY_EVENT.validate_json(line) for line in rest.splitlines())
    assert isinstance(saved, CheckpointSaved)
    assert stopped == StoppedEarly(step=saved.step, checkpoint_saved=True)


def test_too_few_processes_are_told_how_to_be_more(tmp_path: Path) -> None:
    done = _run([], _spec(tmp_path, num_workers=2), tmp_path / "job")
    assert done.returncode == 1
    assert "asks for num_workers 2, and 1 started; start 2 (torchrun --nproc_per_node=2)" in done.stderr


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "No such file"), ('{"name": "x"}', "give epochs or max_steps")]
)
def test_a_wrong_spec_is_told_without_a_traceback(tmp_path: Path, content: str | None, problem: str) -> None:
    spec = tmp_path / "spec.json"
    if content is not None:
        spec.write_text(content)
    done = _run([], spec, tmp_path / "job")
    assert done.returncode == 2
    assert problem in done.stderr
    assert "Traceback" not in done.stderr
