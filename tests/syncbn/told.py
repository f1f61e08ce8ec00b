"""What ranks are told when an exchange fails: two named layers to run wrongly, and the errors that come of it."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from syncbn import ExchangeError, convert_sync_batchnorm

NUM_CHANNELS = 6


@dataclass(frozen=True)
class Told:
    """The error that a rank got, and after how long."""

    rank: int
    error: str
    layer: str
    ranks: tuple[int, ...]
    detail: str
    elapsed_s: float


def told_by(run: Callable[[], object]) -> Told:
    """What ``run`` raises on this rank; AssertionError if it raises nothing."""
    start = time.monotonic()
    try:
        run()
    except ExchangeError as error:
        elapsed_s = time.monotonic() - start
        return Told(dist.get_rank(), type(error).__name__, error.layer, error.ranks, error.detail, elapsed_s)
    raise AssertionError("no error was raised")


def two_layers(process_group: ProcessGroup | None = None, num_channels: int = NUM_CHANNELS) -> nn.Sequential:
    """A ``stem`` and a ``head``, synchronized and so named."""
    layers = OrderedDict[str, nn.Module]((name, nn.BatchNorm1d(num_channels)) for name in ("stem", "head"))
    model = nn.Sequential(layers)
    convert_sync_batchnorm(model, process_group)
    return model


def batch(num_channels: int = NUM_CHANNELS, dtype: torch.dtype = torch.float32) -> Tensor:
    """An input of four rows that differ, which needs a gradient."""
    rows = torch.arange(4.0 * num_channels, dtype=dtype).view(4, num_channels)
    return rows.requires_grad_()


def impatient_group(timeout_s: float) -> ProcessGroup:
    """All ranks, with less patience than the test."""
    group = dist.new_group(timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, ProcessGroup)
    return group


def wait_for(*keys: str) -> None:
    """Do nothing until other ranks have announced the ``keys``, for a minute at most."""
    _store().wait(list(keys), timedelta(seconds=60))


def announce(key: str) -> None:
    """Let the ranks go on that wait for ``key``."""
    _store().set(key, "")


def put(key: str, value: str) -> None:
    """Tell the other ranks ``value``."""
    _store().set(key, value)


def get(key: str) -> str:
    """What another rank put, waiting for it."""
    text: str = _store().get(key).decode()
    return text


def _store() -> Any:
    world = dist.group.WORLD
    assert world is not None
    return world.get_group_store()
