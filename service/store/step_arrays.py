"""Steps of many ranks as one numpy array of records, and columns of it as small blobs."""

import zlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from service.jobs import StepMetrics

STEP = np.dtype(
    [
        ("rank", "<i4"),
        ("step", "<i4"),
        ("attempt", "<i4"),
        ("epoch", "<i4"),
        ("loss", "<f8"),
        ("learning_rate", "<f8"),
        ("step_s", "<f8"),
    ]
)
"""What one rank measured at one step; rank and step together are its key."""

Steps = NDArray[np.void]
"""An array of `STEP`."""

FIELDS = tuple(name for name in STEP.names or () if name != "rank")
"""The columns of a chunk, which is of one rank."""

_LEVEL = 1
"""More effort makes blobs 1 % smaller and takes up to twice the time."""


def step_array(attempt: int, told: Iterable[tuple[int, StepMetrics]]) -> Steps:
    """Each ``(rank, step)`` as a record, in the same order."""
    rows = [(rank, t.step, attempt, t.epoch, t.loss, t.learning_rate, t.step_s) for rank, t in told]
    return np.array(rows, dtype=STEP)


def keys(steps: Steps) -> NDArray[np.int64]:
    """Rank and step of each record as one number, sorted by rank and then by step."""
    return steps["rank"].astype(np.int64) << 32 | steps["step"].astype(np.int64)


def latest(steps: Steps) -> Steps:
    """Sorted by rank and step; of a step that a rank tells twice the later word counts."""
    backwards = steps[::-1]
    return backwards[np.unique(keys(backwards), return_index=True)[1]]


def pack(column: NDArray[np.generic]) -> bytes:
    """A column of numbers as a blob: little-endian, first all lowest bytes, then all second ones, and so on.

    Neighbours differ little in their high bytes, which lie side by side this way: 20 % smaller than without, and
    quicker. Cost: 0.1 ms for 2,048 doubles.
    """
    planes = np.frombuffer(column.tobytes(), np.uint8).reshape(-1, column.itemsize).T
    return zlib.compress(planes.tobytes(), _LEVEL)


def unpack(blob: bytes, field: str) -> NDArray[np.generic]:
    """Inverse of `pack` for a column that is ``field`` of `STEP`."""
    kind = STEP[field]
    planes = np.frombuffer(zlib.decompress(blob), np.uint8).reshape(kind.itemsize, -1)
    return np.frombuffer(planes.T.tobytes(), kind)
