"""Runs of a tiny job, as tests of training make and read them."""

from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from service.jobs import JobSpec, StepMetrics, TelemetryEvent
from service.training.checkpoint import Checkpoint, latest_checkpoint
from service.training.context import RankContext
from tests.service.training.idx_files import write_data_set

Event = TypeVar("Event")
CPU = torch.device("cpu")


def tiny_spec(folder: Path, **changes: Any) -> JobSpec:
    """A job of 48 training images in batches of 8: six steps an epoch."""
    fields = {
        "name": "tiny",
        "data": write_data_set(folder / "images"),
        "model": {"name": "mlp", "hidden_sizes": [8, 8]},
        "batch_size_per_worker": 4,
        "num_workers": 2,
        "max_steps": 14,
        "cadence": {"checkpoint_every_steps": 5},
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
    }
    return JobSpec.model_validate(fields | changes)


def own_context(storage: Path, start_checkpoint: Path | None = None) -> RankContext:
    """Where the rank that this process is stands."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return RankContext(rank, world_size, CPU, storage, start_checkpoint=start_checkpoint)


def of(kind: type[Event], events: list[TelemetryEvent]) -> list[Event]:
    """The events of one kind."""
    return [event for event in events if isinstance(event, kind)]


def losses(events: list[TelemetryEvent]) -> dict[int, float]:
    """The loss of each step."""
    return {event.step: event.loss for event in of(StepMetrics, events)}


def last_checkpoint(storage: Path) -> Checkpoint:
    """The newest good checkpoint of a run."""
    checkpoint = latest_checkpoint(storage / "checkpoints").checkpoint
    assert checkpoint is not None
    return checkpoint


def assert_equal(one: Checkpoint, other: Checkpoint) -> None:
    """Bit for bit the same weights, statistics, generators and optimizer."""
    assert one.model.keys() == other.model.keys()
    assert all(torch.equal(value, other.model[name]) for name, value in one.model.items())
    assert torch.equal(one.rng_states, other.rng_states)
    for parameter, state in one.optimizer["state"].items():
        assert all(torch.equal(torch.as_tensor(v), other.optimizer["state"][parameter][k]) for k, v in state.items())
