"""Several services, each with threads, that work on one database at the same time."""

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

from service.errors import Conflict, TooManyRequests
from service.jobs import (
    TRANSITIONS,
    IngestBatch,
    IngestReply,
    Job,
    LogLine,
    Phase,
    PhaseChanged,
    PrincipalTerms,
    Quota,
    Role,
    TelemetryEvent,
    attempt_id,
)
from service.store import JobStore
from tests.service.store.clock import Clock
from tests.service.store.conftest import OpenStore
from tests.service.store.telling import evaluation, rank_batch, spec, started, step

_Answer = TypeVar("_Answer")


def at_once(num_threads: int, work: Callable[[int], _Answer]) -> list[_Answer]:
    """What ``work`` answers to each number, all begun at the same moment."""
    barrier = threading.Barrier(num_threads)

    def begin(index: int) -> _Answer:
        barrier.wait(30)
        return work(index)

    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(begin, range(num_threads)))


def test_one_key_makes_one_job_for_each_owner(open_store: OpenStore) -> None:
    stores = [open_store() for _ in range(3)]

    def create(index: int) -> tuple[Job, bool]:
        return stores[index % 3].create(spec(), "key", owner="anna" if index % 2 else "bert")

    answers = at_once(12, create)
    for owner in ("anna", "bert"):
        own = [(job.id, created) for job, created in answers if job.owner == owner]
        assert len(own) == 6
        assert len({job_id for job_id, _ in own}) == 1
        assert sum(created for _, created in own) == 1
    assert len(stores[0].unfinished()) == 2


def test_submissions_at_once_keep_to_the_quota_to_the_last_job(open_store: OpenStore) -> None:
    stores = [open_store() for _ in range(4)]
    stores[0].principals.put("anna", PrincipalTerms(role=Role.SUBMITTER, quota=Quota(max_queued_jobs=5)))

    def create(index: int) -> Job | TooManyRequests:
        try:
            return stores[index % 4].create(spec(), "first" if index == 0 else None, owner="anna")[0]
        except TooManyRequests as refused:
            return refused

    answers = at_once(20, create)
    assert sum(isinstance(answer, Job) for answer in answers) == 5
    assert {str(answer) for answer in answers if isinstance(answer, TooManyRequests)} == {
        "5 jobs of anna wait, and 5 may; come back when some have started, :cancel some, "
        "or ask an admin for a larger quota"
    }
    assert len(stores[0].unfinished()) == 5
    stores[0].create(spec(), owner="bert")
    stores[0].start_attempt(next(job for job in stores[0].unfinished() if job.owner == "anna"))
    created, _ = stores[1].create(spec(), "last", owner="anna")
    assert stores[2].create(spec(), "last", owner="anna") == (created, False)  # again, though the quota is reached


def test_the_same_facts_from_two_sides_are_stored_once(open_store: OpenStore) -> None:
    """A runner whose first post timed out posts again while the service still works on the first."""
    stores = [open_store() for _ in range(4)]
    job, token = stores[0].start_attempt(stores[0].create(spec())[0])
    facts: list[TelemetryEvent] = [
        started(),
        *(step(n, loss=float(n)) for n in range(1, 21)),
        LogLine(text="once"),
        evaluation(20),
    ]

    def post(index: int) -> IngestReply:
        parts = tuple(rank_batch(facts, rank) for rank in ((0, 1) if index % 2 else (1, 0)))
        return stores[index].ingest(attempt_id(job.id, 1), token, IngestBatch(batches=parts))

    assert {str(reply.next_seq) for reply in at_once(4, post)} == {str({0: 23, 1: 23})}
    told = stores[0].events(job.id)
    assert sorted(event.type for event in told[2:]) == ["evaluation"] * 2 + ["rank_started"] * 2
    assert [event.seq for event in told] == list(range(1, 7))
    assert [record.rank for record in stores[0].logs(job.id)] in ([0, 1], [1, 0])
    series = stores[0].metric(job.id, "train/loss", max_points=None)
    assert dict(zip(series.steps, series.values, strict=True)) == {n: float(n) for n in range(1, 21)}


def test_pages_tell_each_job_once_while_others_are_made(open_store: OpenStore, clock: Clock) -> None:
    reader, writer = open_store(), open_store()
    for number in range(40):
        clock.advance(number % 3 == 0)
        reader.create(spec(f"before {number}"))
    before = [job.spec.name for job in reader.list_jobs(100).items]
    assert len(before) == 40
    clock.advance(1)
    done = threading.Event()

    def read_or_write(index: int) -> list[str]:
        if index == 1:
            while not done.is_set():
                writer.create(spec("meanwhile"))
            return []
        names: list[str] = []
        cursor = None
        while True:
            page = reader.list_jobs(3, cursor)
            names += [job.spec.name for job in page.items]
            cursor = page.next_cursor
            if cursor is None:
                done.set()
                return names

    names = at_once(2, read_or_write)[0]
    assert [name for name in names if name != "meanwhile"] == before


def test_whatever_writers_do_at_once_a_job_has_one_history(open_store: OpenStore) -> None:
    stores = [open_store() for _ in range(3)]
    job, token = stores[0].start_attempt(stores[0].create(spec(num_workers=8))[0])
    tokens = {1: token}

    def work(index: int) -> int:
        store, choose, moves = stores[index % 3], random.Random(index), 0
        for number in range(25):
            moves += _one_write(store, job.id, tokens, index, number, choose)
        return moves

    moves = sum(at_once(6, work))
    end = stores[0].get(job.id)
    told = stores[0].events(job.id)
    assert [event.seq for event in told] == list(range(1, len(told) + 1))
    changes = [event.body for event in told if event.type == "state_changed"]
    assert all(later["from"] == earlier["to"] for earlier, later in pairwise(changes))
    assert end.state == changes[-1]["to"]
    assert end.version == len(changes) == moves + 2
    lines = stores[0].logs(job.id)
    assert [record.seq for record in lines] == list(range(1, len(lines) + 1))
    assert len({record.text for record in lines}) == len(lines) > 0


def _one_write(
    store: JobStore, job_id: str, tokens: dict[int, str], writer: int, number: int, choose: random.Random
) -> int:
    """Do one thing to the job as it stands; 1 where that moved its state. ``tokens`` are by attempt."""
    job = store.get(job_id)
    kind = choose.choice(["move", "describe", "log", "tell"])
    # Never into a state that ends it: the writers shall go on disturbing each other.
    possible = sorted(state for state in TRANSITIONS[job.state] if not state.terminal and state != "cancelling")
    if kind == "move" and possible:
        try:
            to = choose.choice(possible)
            if to == "starting":
                moved, tokens[job.attempt + 1] = store.start_attempt(job)
                assert moved.attempt == job.attempt + 1
            else:
                store.transition(job, to)
        except Conflict:
            return 0
        return 1
    if kind == "describe":
        store.describe(job_id, phase=choose.choice(list(Phase)), detail=f"{writer} {number}")
    elif kind == "log":
        if job.attempt in tokens:  # else who began the attempt is about to tell its token
            line = rank_batch([LogLine(text=f"{writer} {number}")], rank=2 + writer, first_seq=number)
            store.ingest(attempt_id(job_id, job.attempt), tokens[job.attempt], IngestBatch(batches=(line,)))
    else:
        told = rank_batch([PhaseChanged(phase=choose.choice(list(Phase))), started()], rank=writer % 2)
        store.ingest(attempt_id(job_id, 1), tokens[1], IngestBatch(batches=(told,)))
    return 0
