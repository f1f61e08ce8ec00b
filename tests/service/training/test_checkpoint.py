import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from service.jobs import Cadence, JobSpec, Timeouts
from service.training.checkpoint import (
    Checkpoint,
    UnusableCheckpoint,
    checkpoint_path,
    fingerprint,
    latest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)

DEADLINE_S = 60.0


def _checkpoint(step: int, num_values: int = 1000) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(num_values, generator=generator)
    return Checkpoint(
        step=step,
        fingerprint="f" * 64,
        model={"weight": weight, "running_mean": torch.tensor([float("nan"), 1e-300], dtype=torch.float64)},
        optimizer={"state": {0: {"momentum_buffer": -weight}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        rng_states=torch.arange(6, dtype=torch.uint8).reshape(2, 3),
    )


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    written = _checkpoint(7)
    read = read_checkpoint(write_checkpoint(tmp_path / "new", written))
    assert (read.step, read.fingerprint) == (7, "f" * 64)
    for name, tensor in written.model.items():
        assert read.model[name].numpy().tobytes() == tensor.numpy().tobytes()
    assert torch.equal(read.optimizer["state"][0]["momentum_buffer"], -written.model["weight"])
    assert read.optimizer["param_groups"] == written.optimizer["param_groups"]
    assert torch.equal(read.rng_states, written.rng_states)


def test_anyone_can_load_the_file_with_torch_alone(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, _checkpoint(7))
    assert torch.equal(torch.load(path, weights_only=True)["model"]["weight"], _checkpoint(7).model["weight"])


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 100_000_000, 100_000_001):
        write_checkpoint(tmp_path, _checkpoint(step))
    assert _files(tmp_path) == [f"step-{s}.{kind}" for s in (100_000_000, 100_000_001) for kind in ("json", "pt")]
    found = latest_checkpoint(tmp_path).checkpoint
    assert found is not None
    assert found.step == 100_000_001


def test_steps_of_nine_digits_come_after_those_of_eight(tmp_path: Path) -> None:
    for step in (99_999_998, 99_999_999, 100_000_000):
        write_checkpoint(tmp_path, _checkpoint(step))
    assert {path.name for path in tmp_path.glob("*.pt")} == {"step-99999999.pt", "step-100000000.pt"}
    found = latest_checkpoint(tmp_path).checkpoint
    assert found is not None
    assert found.step == 100_000_000


def test_an_empty_or_absent_folder_has_no_checkpoint(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        found = latest_checkpoint(folder)
        assert found.checkpoint is None
        assert found.problems == ()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_truncated_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, share: float) -> None:
    write_checkpoint(tmp_path, _checkpoint(1))
    path = write_checkpoint(tmp_path, _checkpoint(2))
    os.truncate(path, int(path.stat().st_size * share))
    _expect_first_and_problem(tmp_path, "it was cut off")


def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, _checkpoint(1))
    path = write_checkpoint(tmp_path, _checkpoint(2))
    whole = path.read_bytes()
    for position in np.linspace(0, len(whole) - 1, 25).astype(int):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        _expect_first_and_problem(tmp_path, "was changed after it was written")
    path.write_bytes(whole)
    found = latest_checkpoint(tmp_path).checkpoint
    assert found is not None
    assert found.step == 2


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b"\xff\xfe"])
def test_a_checkpoint_without_a_sound_manifest_is_none(tmp_path: Path, content: bytes | None) -> None:
    write_checkpoint(tmp_path, _checkpoint(1))
    manifest = write_checkpoint(tmp_path, _checkpoint(2)).with_suffix(".json")
    manifest.unlink()
    if content is not None:
        manifest.write_bytes(content)
    _expect_first_and_problem(tmp_path, "cannot be read")


def test_a_manifest_without_its_checkpoint_is_none(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, _checkpoint(1))
    write_checkpoint(tmp_path, _checkpoint(2)).unlink()
    _expect_first_and_problem(tmp_path, "cannot be read")


def test_two_good_ones_never_make_way_for_damaged_ones_of_later_steps(tmp_path: Path) -> None:
    for step in (30, 40):
        os.truncate(write_checkpoint(tmp_path, _checkpoint(step)), 10)
    write_checkpoint(tmp_path, _checkpoint(10))
    assert _files(tmp_path) == ["step-00000010.json", "step-00000010.pt"]


def _expect_first_and_problem(folder: Path, problem: str) -> None:
    found = latest_checkpoint(folder)
    assert found.checkpoint is not None
    assert found.checkpoint.step == 1
    assert torch.equal(found.checkpoint.model["weight"], _checkpoint(1).model["weight"])
    assert len(found.problems) == 1
    assert problem in found.problems[0]
    with pytest.raises(UnusableCheckpoint, match=problem):
        read_checkpoint(checkpoint_path(folder, 2))


WRITE_FOR_EVER = """
import sys, torch
from pathlib import Path
from service.training.checkpoint import Checkpoint, write_checkpoint
for step in range(1, 10_000):
    weight = torch.full((8_000_000,), float(step))
    write_checkpoint(Path(sys.argv[1]), Checkpoint(step, "f", {"weight": weight}, {}, torch.zeros(1, 1)))
"""


def test_a_writer_killed_in_the_middle_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path)])
    try:
        half = _stop_in_the_middle(writer, tmp_path)
    finally:
        writer.kill()
        writer.wait(DEADLINE_S)
    assert half.exists()
    found = latest_checkpoint(tmp_path)
    assert found.checkpoint is not None
    assert found.problems == ()
    step = found.checkpoint.step
    assert half.name == f".step-{step + 1:08d}.pt.part"
    assert torch.equal(found.checkpoint.model["weight"], torch.full((8_000_000,), float(step)))

    write_checkpoint(tmp_path, _checkpoint(step + 1))
    assert not half.exists()


def _stop_in_the_middle(writer: subprocess.Popen[bytes], folder: Path) -> Path:
    """Stop the process while it writes a checkpoint that has one before it; the half-written file."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if any(path.stat().st_size for path in _half_written(folder)) and any(folder.glob("step-*.json")):
            os.kill(writer.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, writer.pid, os.WSTOPPED)
            halves = _half_written(folder)  # it may have come to the rename before it stopped
            if halves and halves[0].name.endswith(".pt.part"):
                return halves[0]
            os.kill(writer.pid, signal.SIGCONT)
        time.sleep(0.001)
    raise AssertionError(f"never seen writing; {_files(folder)}")


def _half_written(folder: Path) -> list[Path]:
    return [path for path in folder.glob(".step-*.part") if path.exists()]


WRITE_BEYOND_THE_LIMIT = """
import sys
from pathlib import Path
from tests.service.training.test_checkpoint import expect_failed_write
expect_failed_write(Path(sys.argv[1]))
"""


def expect_failed_write(folder: Path) -> None:
    """Write one that fits, then one that the file size limit of this process cuts off."""
    write_checkpoint(folder, _checkpoint(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    _expect_refusal_that_harms_nothing(folder)


def test_a_write_beyond_the_file_size_limit_harms_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE_BEYOND_THE_LIMIT, str(tmp_path)]
    subprocess.run(command, check=True, timeout=DEADLINE_S)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small file system, and not in every container")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=DEADLINE_S)


def test_a_full_disk_harms_nothing(tiny_disk: Path) -> None:
    write_checkpoint(tiny_disk, _checkpoint(1))
    _expect_refusal_that_harms_nothing(tiny_disk)
    write_checkpoint(tiny_disk, _checkpoint(3))


def _expect_refusal_that_harms_nothing(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OSError, match=r"File too large|No space left"):
        write_checkpoint(folder, _checkpoint(2, num_values=100_000))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    found = latest_checkpoint(folder).checkpoint
    assert found is not None
    assert found.step == 1


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda spec: spec.model_copy(update={"name": "other"}), True),
        (lambda spec: spec.model_copy(update={"cadence": Cadence(checkpoint_every_steps=3)}), True),
        (lambda spec: spec.model_copy(update={"timeouts": Timeouts(collective_s=5)}), True),
        (lambda spec: spec.model_copy(update={"seed": 1}), False),
        (lambda spec: spec.model_copy(update={"num_workers": 3}), False),
        (lambda spec: spec.model_copy(update={"num_workers": 4, "batch_size_per_worker": 16}), True),
        (lambda spec: spec.model_copy(update={"bn_momentum": 0.2}), False),
    ],
)
def test_the_fingerprint_changes_with_the_numbers(change: Callable[[JobSpec], JobSpec], same: bool) -> None:
    spec = JobSpec(name="digits", epochs=1)
    assert (fingerprint(change(spec)) == fingerprint(spec)) is same


def test_the_manifest_can_be_read_by_people(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, _checkpoint(7))
    manifest = json.loads(path.with_suffix(".json").read_text())
    assert manifest["step"] == 7
    assert manifest["file"] == path.name
    assert manifest["size_bytes"] == path.stat().st_size
