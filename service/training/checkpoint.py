"""Checkpoints that are whole or not there.

A checkpoint is two files: ``step-00000120.pt``, a plain torch file that anyone can load, and
``step-00000120.json``, its manifest with size, SHA-256, the model's proof and what is known of its running statistics,
which is written last. Each file is
written under another name in the same folder, flushed to the disk and renamed. A checkpoint counts only if its
manifest is there and agrees, so a write that was cut off, a full disk and a flipped bit all look the same: not a
checkpoint.
"""

import hashlib
import io
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from service.jobs import JobSpec, StatisticsCertificate
from service.training.certificate import Proof
from service.training.durable import write_atomically

NUM_KEPT = 2
"""How many checkpoints a folder keeps: the newest, and one to fall back on."""
_NOT_OF_THE_NUMBERS = {
    "name",
    "cadence",
    "resources",
    "timeouts",
    "retries",
    "priority",
    "after",
    "diagnostics",
    "recompute_bn",
    "target",
    "stop_when",
    "drift_limits",
}
_IN_THE_MANIFEST = {"proof", "statistics"}
_TOLD_BY_THEIR_PRODUCT = {"num_workers", "batch_size_per_worker"}


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on from ``step`` as if nothing had happened.

    ``model`` holds parameters and running statistics under torch's keys; ``rng_states`` is uint8
    ``(world_size, S)``, see `service.training.rng`. Step is also the position in the data and in the schedule.
    ``requests_met`` is how many requests for a checkpoint were known when this one was made, and so met by it.
    ``proof`` is what the model was known by, ``statistics`` what is known of its running statistics; both lie in the
    manifest, and checkpoints of old have none. ``population_statistics`` are the mean and the unbiased variance of the
    population by layer path, as ``{"mean": (C,), "unbiased_var": (C,)}``, where the job asked for them; the run goes
    on with those in ``model``. ``has_no_start`` says that those were once replaced by the population's, so that
    nothing of what they began with is left. ``best_losses`` are those of each validation image at the best evaluation
    so far, that of ``best_step``, float64 ``(N,)``.
    """

    step: int
    fingerprint: str
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    rng_states: Tensor
    requests_met: int = 0
    proof: Proof | None = None
    statistics: StatisticsCertificate | None = None
    population_statistics: dict[str, dict[str, Tensor]] | None = None
    has_no_start: bool = False
    best_step: int = 0
    best_losses: Tensor | None = None

    @property
    def num_workers(self) -> int:
        """How many workers made it."""
        return len(self.rng_states)


@dataclass(frozen=True)
class LatestCheckpoint:
    """What a folder has to offer: the newest good checkpoint, and what was wrong with each newer one."""

    checkpoint: Checkpoint | None
    problems: tuple[str, ...]


class UnusableCheckpoint(ValueError):
    """A checkpoint is damaged, or belongs to another run."""


class CheckpointFailed(OSError):
    """A checkpoint that the run must not leave without cannot be written."""


def fingerprint(spec: JobSpec) -> str:
    """SHA-256 over what decides a run's numbers; what only says when, how and on how many workers may differ.

    Of workers and batch the global batch counts: its images are the same ones in every step, however they are dealt
    out. Under local normalization the numbers then do change; who resumes tells so.
    """
    fields = spec.model_dump(mode="json", exclude=_NOT_OF_THE_NUMBERS | _TOLD_BY_THEIR_PRODUCT)
    fields["global_batch_size"] = spec.global_batch_size
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write the checkpoint, then drop all but the last two. One process per folder may write at a time.

    Checkpoints of later steps go too: a run that writes step 100 has left those behind as unusable. Holds the
    whole file in memory for a moment, so that the hash is of what was meant and not of what the disk made of it.

    Raises: OSError if the disk is full or fails; older checkpoints are then untouched, and nothing is left over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    buffer = io.BytesIO()
    torch.save({name: value for name, value in vars(checkpoint).items() if name not in _IN_THE_MANIFEST}, buffer)
    content = buffer.getbuffer()
    path = checkpoint_path(folder, checkpoint.step)
    manifest = {
        "step": checkpoint.step,
        "file": path.name,
        "size_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "fingerprint": checkpoint.fingerprint,
        "torch_version": torch.__version__,
        "proof": _proof_to_json(checkpoint.proof),
        "statistics": checkpoint.statistics and checkpoint.statistics.model_dump(mode="json"),
    }
    write_atomically(path, content)
    write_atomically(_manifest_path(path), json.dumps(manifest, indent=1).encode())
    _remove_others(folder, checkpoint.step)
    return path


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at ``path`` (the ``.pt`` file), with its tensors on the CPU.

    Raises: UnusableCheckpoint if it is not whole, bit for bit as it was written.
    """
    try:
        manifest = json.loads(_manifest_path(path).read_bytes())
        size, digest, proof = manifest["size_bytes"], manifest["sha256"], _proof_of_json(manifest.get("proof"))
        statistics = _statistics_of_json(manifest.get("statistics"))
        content = path.read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnusableCheckpoint(f"{path.name}: cannot be read ({type(error).__name__}: {error})") from error
    if len(content) != size:
        raise UnusableCheckpoint(f"{path.name}: {len(content)} bytes where its manifest says {size}; it was cut off")
    if hashlib.sha256(content).hexdigest() != digest:
        raise UnusableCheckpoint(f"{path.name}: its SHA-256 is not the manifest's; it was changed after it was written")
    loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return Checkpoint(**loaded, proof=proof, statistics=statistics)


def latest_checkpoint(folder: Path, told_step: int | None = None) -> LatestCheckpoint:
    """The newest good checkpoint in ``folder``, which need not exist. Reads files until one is good.

    With ``told_step``, those of later steps come last: they count only where there is no other.
    """
    problems: list[str] = []
    paths = _newest_first(folder)
    for path in sorted(paths, key=lambda path: told_step is not None and _step_of(path) > told_step):
        try:
            return LatestCheckpoint(read_checkpoint(path), tuple(problems))
        except UnusableCheckpoint as problem:
            problems.append(str(problem))
    return LatestCheckpoint(None, tuple(problems))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies, if there is one."""
    return folder / f"step-{step:08d}.pt"


def _proof_to_json(proof: Proof | None) -> dict[str, Any] | None:
    if proof is None:
        return None
    loss = proof.probe_loss
    return asdict(proof) | {"probe_loss": loss if math.isfinite(loss) else str(loss)}  # JSON has no NaN


def _proof_of_json(fields: dict[str, Any] | None) -> Proof | None:
    return Proof(**(fields | {"probe_loss": float(fields["probe_loss"])})) if fields else None


def _statistics_of_json(fields: dict[str, Any] | None) -> StatisticsCertificate | None:
    return StatisticsCertificate.model_validate(fields) if fields else None


def _newest_first(folder: Path) -> list[Path]:
    # Manifests count too: one whose other half has vanished should be told, not passed over.
    paths = {path.with_suffix(".pt") for kind in ("pt", "json") for path in folder.glob(f"step-*.{kind}")}
    return sorted((path for path in paths if path.stem[5:].isdigit()), key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.stem[5:])  # "step-" and digits


def _manifest_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(".step-*.part"):
        path.unlink()


def _remove_others(folder: Path, newest_step: int) -> None:
    paths = _newest_first(folder)
    kept = [path for path in paths if _step_of(path) <= newest_step][:NUM_KEPT]
    for path in paths:
        if path not in kept:
            _manifest_path(path).unlink(missing_ok=True)  # first: without it the other half is no checkpoint
            path.unlink(missing_ok=True)
