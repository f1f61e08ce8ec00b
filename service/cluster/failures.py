"""From what each rank died of to why the attempt failed: pure decisions, no Ray."""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from service.jobs import AttemptEnded, Outcome, Reason


class Cause(IntEnum):
    """What ended a rank; the lower, the nearer to the root: one rank's fault ends all others by the higher ones."""

    LOST = 0
    """Its process or node is gone."""
    RAISED = 1
    """Its own code raised."""
    TIMED_OUT = 2
    """It waited in vain for another rank."""
    DISCONNECTED = 3
    """A peer closed the connection under it."""

    @property
    def is_root(self) -> bool:
        """Whether nothing of another rank can have been the reason."""
        return self <= Cause.RAISED


@dataclass(frozen=True)
class RankFailure:
    """The end of one rank: where it ran, what ended it, and the last line of its words."""

    rank: int
    place: str
    cause: Cause
    error: str
    exception: str = ""
    """Name of the exception's class, where one was raised."""


def cause_of(exception_types: Sequence[str], text: str) -> Cause:
    """The cause of an exception with these class names (its own, its bases', its causes') and this text.

    Torch raises plain RuntimeErrors when a collective fails; only their words tell what happened. The layers' own
    error for it keeps those words, and says in which layer and whom it misses. Ranks that disagree are at fault
    themselves, whatever the names of their layers sound like.
    """
    if "RanksDisagree" in exception_types:
        return Cause.RAISED
    if "RuntimeError" not in exception_types and "TimeoutError" not in exception_types:
        return Cause.RAISED
    lowered = text.lower()
    if any(word in lowered for word in _DISCONNECTED):
        return Cause.DISCONNECTED
    if "RanksMissing" in exception_types or any(word in lowered for word in _TIMED_OUT):
        return Cause.TIMED_OUT
    return Cause.RAISED


def failure_of(error: BaseException, rank: int, place: str) -> RankFailure:
    """The end of ``rank`` at ``place`` by an exception that its training raised."""
    last = traceback.format_exception_only(error)[-1].strip()
    return RankFailure(rank, place, cause_of(_class_names(error), last), last, type(error).__name__)


def _class_names(error: BaseException | None) -> list[str]:
    """Class names of an exception, of its bases, and of what it was raised from."""
    names: list[str] = []
    while error is not None:
        names.extend(kind.__name__ for kind in type(error).__mro__)
        error = error.__cause__
    return names


_DISCONNECTED = (
    "connection closed by peer",
    "connection reset by peer",
    "connection was likely closed",
    "connectfullmesh failed",
    "application timeout caused pair closure",
    "broken pipe",
    "socket closed",
    "ncclremoteerror",
    "nccl communicator was aborted",
)
_TIMED_OUT = (
    "timed out waiting",
    "timed out after",
    "wait timeout",
    "collective operation timeout",
    "collectivetimeout",
    "did not come within",
    "did not answer within",
)


_REASON_OF_EXCEPTION = {
    "UnusableCheckpoint": Reason.CHECKPOINT_UNUSABLE,
    "CheckpointFailed": Reason.CHECKPOINT_FAILED,
}
"""Exceptions of the training that are not its user's fault, or are but have a reason of their own."""


def judge(failures: Sequence[RankFailure], silent: Sequence[str] = ()) -> AttemptEnded:
    """Why the attempt failed, from all ranks' failures in the order they were seen.

    The first root cause counts. Where there is none, ranks that waited in vain or were cut off accuse another:
    ``silent`` names the places that had stopped answering by then. The words of a rank that knows whom it missed, and
    in which layer, go with those of the first that waited, who may be the missed one itself. ``failures`` must not be
    empty.
    """
    worst = min(failures, key=lambda failure: not failure.cause.is_root)
    if worst.cause is Cause.LOST:
        return _failed(Reason.WORKER_LOST, f"{worst.place} was lost: {worst.error}")
    if worst.cause is Cause.RAISED:
        reason = _REASON_OF_EXCEPTION.get(worst.exception, Reason.TRAINING_ERROR)
        return _failed(reason, f"{worst.place}: {worst.error}")
    waited = [failure for failure in failures if failure.cause is Cause.TIMED_OUT]
    if waited:
        first = min(waited, key=_knows_nobody)
        blame = f"; {_and(silent)} had stopped answering" if silent else ""
        others = sorted(failures, key=_knows_nobody)[:1] if _knows_nobody(first) else []
        words = "".join(f"; {other.place}: {other.error}" for other in others if not _knows_nobody(other))
        return _failed(
            Reason.COLLECTIVE_TIMEOUT,
            f"{first.place} waited in vain for the other ranks{blame}: {first.error}{words}",
        )
    blame = f"{_and(silent)} stopped answering" if silent else "no rank is reported dead yet"
    return _failed(Reason.WORKER_LOST, f"{worst.place} lost its connection to a peer, {blame}: {worst.error}")


def _knows_nobody(failure: RankFailure) -> bool:
    """Whether it cannot say who was missing."""
    return failure.exception != "RanksMissing"


def no_heartbeat(places: Sequence[str], silence_s: float) -> AttemptEnded:
    """The end of an attempt in which ranks have given no sign of life for ``silence_s``."""
    return _failed(
        Reason.NO_HEARTBEAT,
        f"{_and(places)} gave no sign of life for {silence_s:.0f} s; "
        "its process hangs or its node is overloaded or cut off (timeouts.heartbeat_s is the limit)",
    )


def _failed(reason: Reason, detail: str) -> AttemptEnded:
    return AttemptEnded(outcome=Outcome.FAILED, reason=reason, detail=detail)


def _and(places: Sequence[str]) -> str:
    return " and ".join(places)
