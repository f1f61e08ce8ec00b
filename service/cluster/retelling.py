"""Steps that a lost attempt had measured and not told, told by the next one from a record on disk."""

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from service.jobs import LogLine, RankStarted, StepMetrics, TelemetryEvent
from service.training.context import RankContext
from service.training.meeting import highest_over_ranks

MAX_STEPS = 100_000
"""How many of a rank's last steps are at least kept, 40 bytes each; a service that was away for longer misses some."""

_STEP = struct.Struct("<qqddd")  # step, epoch, loss, learning rate, seconds


class StepRecord:
    """One rank's last steps in the file ``path``, each of them written before the rank takes the next.

    What was written outlives the process, not a power cut. Of a step that is there twice the later word counts.
    Raises: OSError from every method but `close` where the disk takes no more.
    """

    def __init__(self, path: Path, max_steps: int = MAX_STEPS) -> None:
        self._path = path
        self._max_steps = max_steps
        self._descriptor: int | None = None
        self._count = 0

    def between(self, after: int, until: int) -> list[StepMetrics]:
        """The last steps after ``after`` that lead to ``until`` without a gap, in order."""
        found = {step.step: step for step in self._read() if after < step.step <= until}
        first = until + 1
        while first - 1 in found:
            first -= 1
        return [found[number] for number in range(first, until + 1)]

    def begin(self, steps: Sequence[StepMetrics]) -> None:
        """Hold these steps and no others."""
        self.close()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".part")
        temporary.write_bytes(b"".join(map(_pack, steps)))
        temporary.rename(self._path)
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        self._count = len(steps)

    def add(self, step: StepMetrics) -> None:
        """Hold one more, which `begin` must precede; of very many the oldest go."""
        assert self._descriptor is not None
        if os.write(self._descriptor, _pack(step)) < _STEP.size:
            raise OSError(f"{self._path} takes no more")
        self._count += 1
        if self._count >= 2 * self._max_steps:
            self.begin(self._read()[-self._max_steps :])

    def close(self) -> None:
        """Let go of the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _read(self) -> list[StepMetrics]:
        content = self._path.read_bytes() if self._path.exists() else b""
        whole = len(content) - len(content) % _STEP.size  # the last one may have been cut off
        return [_unpack(*fields) for fields in _STEP.iter_unpack(content[:whole])]


def retelling(events: Iterable[TelemetryEvent], context: RankContext) -> Iterator[TelemetryEvent]:
    """The ``events`` of this rank's training, preceded by the steps up to its checkpoint that were not told before.

    Without them the series would have a hole where even the oldest checkpoint is of a later step than
    ``context.told_step``. Every rank of the attempt must take every event: at `RankStarted` they meet, because a step
    is told again by all of them or by none. Cost: one exchange of one integer at the start, 40 bytes to a file a step.
    """
    record: StepRecord | None = StepRecord(context.storage / "steps" / f"rank-{context.rank:05d}.bin")
    try:
        for event in events:
            if isinstance(event, RankStarted):
                # Before RankStarted: a rank that has told that has told all before the step where it goes on.
                yield from _not_told(record, context, event.resumed_step)
            if record is not None and isinstance(event, RankStarted | StepMetrics):
                try:
                    _keep(record, event, context)
                except OSError as error:
                    # Training goes on without: the record matters only if the service is away and this rank is lost.
                    yield LogLine(level="warning", text=f"steps are not recorded any more: {error}")
                    record.close()
                    record = None
            yield event
    finally:
        if record is not None:
            record.close()


def _not_told(record: StepRecord | None, context: RankContext, resumed_step: int) -> list[StepMetrics]:
    told = context.told_step
    if told is None or told >= resumed_step:
        return []  # on every rank alike
    steps: list[StepMetrics] = []
    if record is not None:
        with suppress(OSError):  # what cannot be read is not there; the other ranks must hear it all the same
            steps = record.between(told, resumed_step)
    first = highest_over_ranks(resumed_step + 1 - len(steps), context)
    return [step for step in steps if step.step >= first]


def _keep(record: StepRecord, event: RankStarted | StepMetrics, context: RankContext) -> None:
    if isinstance(event, StepMetrics):
        record.add(event)
    else:
        told = event.resumed_step if context.told_step is None else context.told_step
        record.begin(record.between(told, event.resumed_step) if told < event.resumed_step else [])


def _pack(step: StepMetrics) -> bytes:
    return _STEP.pack(step.step, step.epoch, step.loss, step.learning_rate, step.step_s)


def _unpack(step: int, epoch: int, loss: float, learning_rate: float, step_s: float) -> StepMetrics:
    return StepMetrics(step=step, epoch=epoch, loss=loss, learning_rate=learning_rate, step_s=step_s)
