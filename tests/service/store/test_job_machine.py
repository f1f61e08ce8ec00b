"""Jobs under random orders of several actors, legal and not, against a model that knows nothing of the store.

Callers of the API steer, schedulers with a live or a lost lease move what they saw some time ago, runners of new and
old attempts report. Whatever the order: a terminal job never changes, the version counts the changes, the events tell
exactly the path, what is illegal raises Conflict and changes nothing, and of a job's attempts at most one may go on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import Phase as Step
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from service.api.lifecycle import cancel
from service.api.steering import Verb, steer
from service.errors import Conflict
from service.jobs import (
    AttemptEnded,
    Control,
    Job,
    JobState,
    LogLine,
    Outcome,
    Phase,
    TelemetryEvent,
    attempt_id,
)
from service.store import JobStore, Lease, LeaseLost
from tests.service.store.clock import Clock
from tests.service.store.telling import batch, spec, started, step

# As a person would draw it; `service.jobs.states` is what is under test.
LEGAL = {
    "queued": "starting paused cancelled failed",
    "starting": "running recovering pausing cancelling failed",
    "running": "succeeded recovering pausing cancelling failed",
    "recovering": "starting queued cancelling failed",
    "pausing": "paused succeeded recovering cancelling failed",
    "paused": "queued cancelled",
    "cancelling": "cancelled succeeded",
    "succeeded": "",
    "failed": "",
    "cancelled": "",
}
ENDS = {"succeeded", "failed", "cancelled"}
GO_ON = {"starting", "running"}


@dataclass
class Told:
    """What a job must look like."""

    path: list[str] = field(default_factory=lambda: ["queued"])
    version: int = 1
    priority: int = 0
    checkpoint_requests: int = 0
    stop_saves: bool = False
    tokens: list[str] = field(default_factory=list)
    sent: dict[int, int] = field(default_factory=dict)
    end: Job | None = None

    @property
    def state(self) -> str:
        return self.path[-1]

    @property
    def over(self) -> bool:
        return self.state in ENDS

    def move(self, to: str, *, stop_saves: bool = False) -> None:
        self.path.append(to)
        self.version += 1
        self.stop_saves = stop_saves and to == "cancelling"

    def control(self, attempt: int) -> Control:
        if self.over or attempt != len(self.tokens):
            return Control.ABORT
        if self.state in GO_ON:
            return Control.CONTINUE
        saves = self.state == "pausing" or (self.state == "cancelling" and self.stop_saves)
        return Control.STOP if saves else Control.ABORT


class JobMachine(RuleBasedStateMachine):
    """One store for all examples, so each uses jobs and a lease of its own."""

    ids = Bundle("ids")
    views = Bundle("views")

    def __init__(self, store: JobStore, clock: Clock, example: int) -> None:
        super().__init__()
        self.store, self.clock = store, clock
        self.lease_name = f"lease {example}"
        self.told: dict[str, Told] = {}
        self.lost: Lease | None = None

    @initialize(target=ids)
    def a_scheduler_takes_the_lease(self) -> str:
        self.live = self.take_lease("first")
        return self.submit_one()

    def take_lease(self, holder: str) -> Lease:
        lease = self.store.acquire_lease(self.lease_name, holder, 30)
        assert lease is not None
        return lease

    @rule()
    def the_schedulers_lease_is_taken_over(self) -> None:
        other = "second" if self.live.holder == "first" else "first"
        assert self.store.acquire_lease(self.lease_name, other, 30) is None
        self.clock.advance(31)
        self.lost, self.live = self.live, self.take_lease(other)
        assert self.live.token == self.lost.token + 1
        assert not self.store.renew_lease(self.lost, 30)

    # Whoever submits and steers

    @precondition(lambda self: len(self.told) < 3)
    @rule(target=ids)
    def submit(self) -> str:
        return self.submit_one()

    def submit_one(self) -> str:
        job, _ = self.store.create(spec(num_workers=1))
        self.told[job.id] = Told()
        return job.id

    @rule(target=views, job=ids)
    def look(self, job: str) -> Job:
        return self.store.get(job)

    @rule(job=ids, verb=st.sampled_from([*"ccpprrx"]), saves=st.booleans())
    def ask(self, job: str, verb: str, saves: bool) -> None:
        match verb:
            case "c":
                self.checkpoint(job)
            case "p":
                self.pause(job)
            case "r":
                self.resume(job)
            case _:
                self.cancel(job, saves)
        self.let_all_attempts_ask(job)

    def cancel(self, job: str, saves: bool) -> None:
        told = self.told[job]
        with self.expecting(told.state in {"succeeded", "failed"}):
            cancel(self.store, job, checkpoint=saves)
            if told.state == "cancelling":
                told.version += told.stop_saves and not saves
                told.stop_saves = told.stop_saves and saves
            elif not told.over:
                told.move("cancelled" if told.state in {"queued", "paused"} else "cancelling", stop_saves=saves)

    def pause(self, job: str) -> None:
        told = self.told[job]
        with self.expecting(told.over or told.state in {"recovering", "cancelling"}):
            steer(self.store, job, Verb.PAUSE, lambda seen, to: self.store.transition(seen, to))
            if told.state not in {"pausing", "paused"}:
                told.move("paused" if told.state == "queued" else "pausing")

    def resume(self, job: str) -> None:
        told = self.told[job]
        with self.expecting(told.over or told.state in {"pausing", "cancelling"}):
            steer(self.store, job, Verb.RESUME, lambda seen, _: self.store.resume(seen))
            if told.state == "paused":
                told.move("queued")

    def checkpoint(self, job: str) -> None:
        told = self.told[job]
        with self.expecting(told.state not in GO_ON):
            self.store.request_checkpoint(job)
            told.checkpoint_requests += 1

    @rule(seen=views, priority=st.integers(-3, 3))
    def prefer(self, seen: Job, priority: int) -> None:
        told = self.told[seen.id]
        same = priority == told.priority  # then nothing is written, and nothing compared
        with self.expecting(seen.state.terminal or (not same and self.is_stale(seen))):
            self.store.set_priority(seen, priority)
            if not same:
                told.priority, told.version = priority, told.version + 1

    # Schedulers, which act on what they see, or saw some time ago

    @rule(target=views, job=ids, choices=st.lists(st.tuples(st.integers(0, 41), st.booleans()), min_size=2, max_size=9))
    def go_on(self, job: str, choices: list[tuple[int, bool]]) -> Job:
        """Legal moves of a job as it is at each, to an end less often than on; what was seen first goes stale."""
        told, first = self.told[job], self.store.get(job)
        for choice, saves in choices:
            legal = LEGAL[told.state].split()
            if not legal:
                break
            chances = [state for state in legal if state not in ENDS] * 6 + legal
            to = chances[choice % len(chances)]
            seen = self.store.get(job)
            if to == "starting":
                told.tokens.append(self.store.start_attempt(seen, lease=self.live)[1])
            else:
                self.store.transition(seen, JobState(to), stop_saves=saves, lease=self.live)
            told.move(to, stop_saves=saves)
            self.let_all_attempts_ask(job)
        return first

    @rule(seen=views, to=st.sampled_from(JobState), saves=st.booleans(), late=st.booleans())
    def move(self, seen: Job, to: JobState, saves: bool, late: bool) -> None:
        lease = self.lease(late)
        with self.expecting(to not in LEGAL[seen.state].split() or self.is_stale(seen), lease):
            moved = self.store.transition(seen, to, stop_saves=saves, detail="why", lease=lease)
            self.told[seen.id].move(to, stop_saves=saves)
            assert (moved.detail, moved.state_since) == ("why", self.clock.now)

    @rule(seen=views, late=st.booleans())
    def start(self, seen: Job, late: bool) -> None:
        lease, told = self.lease(late), self.told[seen.id]
        with self.expecting(seen.state not in {"queued", "recovering"} or self.is_stale(seen), lease):
            _, token = self.store.start_attempt(seen, lease=lease)
            told.move("starting")
            told.tokens.append(token)

    @rule(seen=consumes(views), late=st.booleans())
    def describe(self, seen: Job, late: bool) -> None:
        before, lease = self.store.get(seen.id), self.lease(late)
        with self.expecting(False, lease):
            said = self.store.describe(seen.id, phase=Phase.WAITING_RESOURCES, version=seen.version, lease=lease)
            changes = not self.told[seen.id].over and not self.is_stale(seen)
            assert said.phase is (Phase.WAITING_RESOURCES if changes else before.phase)

    @rule(job=ids, place=st.integers(1, 9), late=st.booleans())
    def place(self, job: str, place: int, late: bool) -> None:
        before, lease = self.store.get(job), self.lease(late)
        with self.expecting(False, lease if before.queue_position != place and before.state == "queued" else None):
            self.store.set_queue_positions({job: place}, lease=lease)
            assert self.store.get(job).queue_position == (place if before.state == "queued" else None)

    # Runners

    @rule(
        job=ids,
        age=st.integers(0, 2),
        fact=st.sampled_from(
            [started(), step(1), LogLine(text="hello"), AttemptEnded(outcome=Outcome.STOPPED, checkpoint_step=1)]
        ),
    )
    def report(self, job: str, age: int, fact: TelemetryEvent) -> None:
        told = self.told[job]
        attempt = len(told.tokens) - age
        if attempt < 1:
            return
        first = told.sent.get(attempt, 0)
        reply = self.store.ingest(attempt_id(job, attempt), told.tokens[attempt - 1], batch([fact], 0, first))
        assert reply.control is told.control(attempt)
        assert reply.checkpoint_requests == told.checkpoint_requests
        if attempt == len(told.tokens) and not told.over:
            told.sent[attempt] = first + 1
        assert reply.next_seq.get(0, 0) == told.sent.get(attempt, 0)

    def let_all_attempts_ask(self, job: str) -> None:
        """Whether they shall go on: each runner asks at least every few seconds."""
        told = self.told[job]
        replies = [
            self.store.ingest(attempt_id(job, number), token, batch([])).control
            for number, token in enumerate(told.tokens, start=1)
        ]
        assert replies == [told.control(number) for number in range(1, len(replies) + 1)]
        assert sum(reply is not Control.ABORT for reply in replies) <= 1

    # What must always hold

    @invariant()
    def every_job_is_as_told(self) -> None:
        self.clock.advance(0.25)
        for job_id, told in self.told.items():
            job = self.store.get(job_id).model_copy(update={"heartbeat_age_s": None})
            assert (job.state, job.version, job.attempt) == (told.state, told.version, len(told.tokens))
            assert (job.spec.priority, job.checkpoint_requests) == (told.priority, told.checkpoint_requests)
            assert job.stop_saves is told.stop_saves
            assert job.queue_position is None or told.state == "queued"
            if told.over:
                told.end = told.end or job
                assert job == told.end

    def teardown(self) -> None:
        """Events are only ever added, so it is enough to read them once."""
        for job_id, told in self.told.items():
            events = self.store.events(job_id)
            assert [event.seq for event in events] == list(range(1, len(events) + 1))
            moves = [event.body for event in events if event.type == "state_changed"]
            assert [body["to"] for body in moves] == told.path
            assert [body["from"] for body in moves] == [None, *told.path[:-1]]

    # Helpers

    def lease(self, late: bool) -> Lease:
        return self.lost if late and self.lost is not None else self.live

    def is_stale(self, seen: Job) -> bool:
        return seen.version != self.told[seen.id].version

    @contextmanager
    def expecting(self, conflict: bool, lease: Lease | None = None) -> Iterator[None]:
        """The block must raise Conflict, or LeaseLost of a lost lease; only else does it reach the model."""
        if conflict:
            with pytest.raises(Conflict):
                yield
        elif lease is not None and lease is not self.live:
            with pytest.raises(LeaseLost):
                yield
        else:
            yield


def test_jobs_keep_to_the_model_whoever_does_what_in_which_order(
    request: pytest.FixtureRequest, store: JobStore, clock: Clock
) -> None:
    class Machine(JobMachine):
        """Hypothesis makes one for each example, and knows nothing of fixtures."""

        def __init__(self) -> None:
            super().__init__(store, clock, next(examples))

    examples = count()
    bounds = settings(
        max_examples=10 if "postgresql" in request.node.name else 30,
        stateful_step_count=40,
        deadline=None,
        database=None,
        phases=[Step.generate],  # to shrink forty steps on a database takes longer than to read them
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Machine, settings=bounds)
