"""Real ranks for tests: processes joined by gloo, forked from one server that has torch imported already.

Importing torch costs a second or two, so the processes come from multiprocessing's fork server: it imports torch,
with what torch imports late, once per test session, and each rank is then a fork of it, fresh and ready in about
0.1 s. Nothing is carried from one call to the next, and the server ends with the test process.
"""

import os
import pickle
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, yet not marked as exported

T = TypeVar("T")

_LAST_WORDS_S = 1.0

_PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch._dynamo",  # imported by the first step of an optimizer
    "torch.fx.experimental.symbolic_shapes",  # imported by the first backward
    "numpy",
    "pytest",
    "syncbn",
)


class RankFailed(Exception):
    """A rank raised, died or did not answer; ``rank`` says which was first, the text holds its traceback."""

    def __init__(self, rank: int, text: str) -> None:
        self.rank = rank
        super().__init__(f"rank {rank}: {text}")


def run_ranks(
    world_size: int, fn: Callable[..., T], *args: Any, timeout_s: float = 60.0, dying: Collection[int] = ()
) -> list[T]:
    """What ``fn(*args)`` returns on each of ``world_size`` ranks, in the order of ranks.

    Every rank is a process of its own with the default process group of ``torch.distributed`` initialized (gloo,
    loopback, collectives limited to ``timeout_s``), one torch thread and warnings turned into errors;
    `torch.distributed.get_rank` tells ``fn`` who it is. ``fn`` must be importable (a function of a module, not a
    closure), and arguments and results picklable. Ranks in ``dying`` are expected to die in it, and are left out of
    the answers.

    Raises:
        RankFailed: naming the rank that first raised, died or was still running after ``timeout_s``.
    """
    task = pickle.dumps((fn, args))  # by value: torch's own way of sending tensors needs both ends alive
    store = TCPStore("127.0.0.1", 0, world_size=None, is_master=True, wait_for_workers=False)
    ranks: list[_Rank] = []
    try:
        for rank in range(world_size):
            ranks.append(_start(_Place(rank, world_size, store.port, timeout_s), task))
        # From here, because the first start waits for the fork server's own imports.
        return _collect(ranks, time.monotonic() + timeout_s, dying)
    finally:
        _end(ranks)


@dataclass(frozen=True)
class _Place:
    """Where a rank stands, and at which port of this machine it meets the others."""

    rank: int
    world_size: int
    port: int
    timeout_s: float


@dataclass(frozen=True)
class _Rank:
    process: BaseProcess
    answer: Connection


@dataclass(frozen=True)
class _Outcome:
    """What became of ``fn`` on a rank, and when by the machine's monotonic clock."""

    time: float
    result: Any = None
    failure: str | None = None
    died: bool = False


def _start(place: _Place, task: bytes) -> _Rank:
    context = get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOAD))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_rank_main, args=(place, sender, task), name=f"rank-{place.rank}", daemon=True)
    process.start()
    sender.close()
    return _Rank(process, receiver)


def _collect(ranks: Sequence[_Rank], deadline: float, dying: Collection[int]) -> list[Any]:
    """Every other rank's result. Raises for the first failure, which others may follow: their peer is gone."""
    outcomes: dict[int, _Outcome] = {}
    pending = dict(enumerate(ranks))
    while pending and wait([rank.answer for rank in pending.values()], max(deadline - time.monotonic(), 0.0)):
        outcomes |= {number: _receive(rank) for number, rank in pending.items() if rank.answer.poll()}
        pending = {number: rank for number, rank in enumerate(ranks) if number not in outcomes}
        if _failures(outcomes, dying):  # a rank that died may be heard of after those that it took along
            deadline = min(deadline, time.monotonic() + _LAST_WORDS_S)
    failures = _failures(outcomes, dying)
    if failures:
        _, first, text = min(failures)
        raise RankFailed(first, text)
    if pending:
        raise RankFailed(min(pending), f"no answer in time; still running: {', '.join(map(str, pending))}")
    return [outcomes[number].result for number in range(len(ranks)) if number not in dying]


def _failures(outcomes: Mapping[int, _Outcome], dying: Collection[int]) -> list[tuple[float, int, str]]:
    """When, on which rank, and what."""
    texts = {rank: outcome.failure for rank, outcome in outcomes.items() if rank not in dying}
    texts |= {rank: "did not die" for rank in dying if rank in outcomes and not outcomes[rank].died}
    return [(outcomes[rank].time, rank, text) for rank, text in texts.items() if text is not None]


def _receive(rank: _Rank) -> _Outcome:
    try:
        outcome = pickle.loads(rank.answer.recv_bytes())
    except EOFError:
        rank.process.join(timeout=5.0)
        # Time 0: whatever the others have to complain of comes from this death.
        return _Outcome(0.0, failure=f"died without a word, exit code {rank.process.exitcode}", died=True)
    assert isinstance(outcome, _Outcome)
    return outcome


def _end(ranks: Sequence[_Rank]) -> None:
    """Leave no rank behind. Each has given its answer or is not worth waiting for."""
    for rank in ranks:
        rank.process.kill()
    for rank in ranks:
        rank.process.join()
        rank.answer.close()
        rank.process.close()


def _rank_main(place: _Place, answer: Connection, task: bytes) -> None:
    try:
        _join(place)
        fn, args = pickle.loads(task)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = fn(*args)
        message = pickle.dumps(_Outcome(time.monotonic(), result=result))
    except BaseException:  # whatever it was, the test is to see it
        message = pickle.dumps(_Outcome(time.monotonic(), failure=traceback.format_exc()))
    # A failure is told before the group is left: peers notice that at once and fail in turn.
    with suppress(BrokenPipeError):  # the test has given up on us
        answer.send_bytes(message)
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(place: _Place) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    timeout = timedelta(seconds=place.timeout_s)
    store = TCPStore("127.0.0.1", place.port, world_size=None, is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world_size, timeout=timeout)
