"""Taking in what a run tells: each fact once, whatever is repeated, reordered or lost on the way."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from sqlalchemy import Connection, insert, select, update

from service.errors import FieldProblem, InvalidRequest
from service.jobs import (
    RUNNER,
    AttemptEnded,
    BatchNormSample,
    Control,
    IngestBatch,
    IngestReply,
    Job,
    JobState,
    LogLine,
    PhaseChanged,
    RankBatch,
    RankStarted,
    StepMetrics,
    TelemetryEvent,
)
from service.store.attempts import authorize
from service.store.events import NewEvent, append_events
from service.store.jobs import get_job, phase_changed
from service.store.layer_samples import store_samples
from service.store.logs import NewLine, append_lines
from service.store.progress import advance
from service.store.received import Received
from service.store.schema import attempts, jobs, ranks
from service.store.series import mean_loss
from service.store.steps import store_steps

_TELLS_PHASE = frozenset({JobState.STARTING, JobState.RUNNING, JobState.PAUSING, JobState.CANCELLING})
"""States in which the newest attempt says in which phase it is; in others the scheduler does."""

_MAX_STEP = 2**31


@dataclass(frozen=True)
class _Fact:
    rank: int
    time: datetime
    event: TelemetryEvent


@dataclass
class _Rank:
    """What the store knows of one rank of an attempt."""

    received: Received = field(default_factory=Received)
    started: bool = False
    last_step: int = 0

    def learn(self, event: TelemetryEvent) -> None:
        self.started = self.started or isinstance(event, RankStarted)
        self.last_step = max(self.last_step, _step(event))


def ingest(connection: Connection, attempt_id: str, token: str, batch: IngestBatch, now: datetime) -> IngestReply:
    """Store the facts that are new, and answer what the attempt shall do.

    ``next_seq`` names, for each rank ever heard of, the lowest sequence number that has not arrived. Facts beyond a
    hole are stored at once and remembered; a sender that still has the hole's facts goes back to ``next_seq`` and
    may send everything from there again, one that has not simply goes on.

    An attempt that is no longer the newest, or whose job is terminal, is told to abort and nothing is stored. While a
    job is starting or running its newest attempt is told to go on; while it is pausing, or cancelling in a way that
    saves first, to stop; in every other state to abort. It is listened to in all of them.

    The job's row is locked from being read on: of several that post for one job each waits for the one before, and
    sees all that it stored, whichever database this is.

    Raises: Unauthorized; InvalidRequest for a rank that the job has not, a time or a step that cannot be.
    """
    job_id, attempt = authorize(connection, attempt_id, token)
    job = get_job(connection, job_id, now, lock=True)
    known = _load_ranks(connection, job_id, attempt)
    if job.state.terminal or job.attempt != attempt:
        return _reply(Control.ABORT, job, known)
    _check(batch, job.spec.num_workers)  # which an older attempt may have had more of
    facts = [fact for part in batch.batches for fact in _new_facts(part, known)]
    touched = {part.rank for part in batch.batches}
    _store_ranks(connection, job_id, attempt, {rank: known[rank] for rank in touched})
    _store_facts(connection, job, facts)
    _store_attempt(connection, job, facts, now)
    _store_job(connection, job, facts, known, now)
    return _reply(_control(job), job, known)


def _control(job: Job) -> Control:
    if job.state in (JobState.STARTING, JobState.RUNNING):
        return Control.CONTINUE
    stopping = job.state is JobState.PAUSING or (job.state is JobState.CANCELLING and job.stop_saves)
    return Control.STOP if stopping else Control.ABORT


def _reply(control: Control, job: Job, known: dict[int, _Rank]) -> IngestReply:
    next_seq = {rank: known[rank].received.next_seq for rank in sorted(known)}
    return IngestReply(control=control, next_seq=next_seq, checkpoint_requests=job.checkpoint_requests)


def _check(batch: IngestBatch, num_workers: int) -> None:
    problems = []
    for index, part in enumerate(batch.batches):
        if part.rank >= num_workers:
            text = f"the job has ranks {RUNNER} (the runner) to {num_workers - 1}"
            problems.append(FieldProblem(f"/batches/{index}/rank", "rank_unknown", text))
        if not all(0 <= time < 1e11 for time in part.times):
            text = "times are seconds since 1970, and finite"
            problems.append(FieldProblem(f"/batches/{index}/times", "time_impossible", text))
        if not all(0 <= _stored_step(event) < _MAX_STEP for event in part.events):
            text = f"steps are at least 0 and below {_MAX_STEP}"
            problems.append(FieldProblem(f"/batches/{index}/events", "step_impossible", text))
    if problems:
        raise InvalidRequest(problems)


def _step(event: TelemetryEvent) -> int:
    if isinstance(event, RankStarted):
        return event.resumed_step
    return event.step if isinstance(event, StepMetrics) else 0


def _stored_step(event: TelemetryEvent) -> int:
    """The step under which the fact is kept, where it is."""
    return event.step if isinstance(event, BatchNormSample) else _step(event)


def _load_ranks(connection: Connection, job_id: str, attempt: int) -> dict[int, _Rank]:
    query = select(ranks).where(ranks.c.job_id == job_id, ranks.c.attempt == attempt)
    return {
        row.rank: _Rank(Received.load(row.received), row.started, row.last_step) for row in connection.execute(query)
    }


def _new_facts(part: RankBatch, known: dict[int, _Rank]) -> Iterator[_Fact]:
    """The facts that have not arrived before, now noted as arrived."""
    rank = known.setdefault(part.rank, _Rank())
    end = part.first_seq + len(part.events)
    holes = rank.received.missing(part.first_seq, end)
    rank.received = rank.received.plus(part.first_seq, end)
    for first, stop in holes:
        for index in range(first - part.first_seq, stop - part.first_seq):
            rank.learn(part.events[index])
            yield _Fact(part.rank, datetime.fromtimestamp(part.times[index], UTC), part.events[index])


def _store_ranks(connection: Connection, job_id: str, attempt: int, touched: dict[int, _Rank]) -> None:
    for number, rank in touched.items():
        chosen = {"job_id": job_id, "attempt": attempt, "rank": number}
        values = {"received": rank.received.dump(), "started": rank.started, "last_step": rank.last_step}
        if connection.execute(update(ranks).filter_by(**chosen).values(values)).rowcount == 0:
            connection.execute(insert(ranks).values(chosen | values))


def _store_facts(connection: Connection, job: Job, facts: Sequence[_Fact]) -> None:
    lines: list[NewLine] = []
    events: list[NewEvent] = []
    phase = job.phase
    for fact in facts:
        event = fact.event
        if isinstance(event, LogLine):
            lines.append(NewLine(fact.time, job.attempt, fact.rank, event.level, event.text))
        elif isinstance(event, PhaseChanged):
            if event.phase is not phase and job.state in _TELLS_PHASE:
                phase = event.phase
                said = {"phase": phase, "reason": job.reason, "detail": job.detail}
                events.append(phase_changed(fact.time, job.attempt, rank=fact.rank, **said))
        elif not isinstance(event, StepMetrics | BatchNormSample):
            events.append(NewEvent(fact.time, event.type, event.model_dump_json(), job.attempt, fact.rank))
    told = [(fact.rank, fact.event) for fact in facts if isinstance(fact.event, StepMetrics)]
    store_steps(connection, job.id, job.attempt, told)
    store_samples(connection, job.id, job.attempt, [f.event for f in facts if isinstance(f.event, BatchNormSample)])
    append_lines(connection, job.id, lines)
    append_events(connection, job.id, events)
    if phase is not job.phase:
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(phase=phase))


def _store_attempt(connection: Connection, job: Job, facts: Sequence[_Fact], now: datetime) -> None:
    values: dict[str, object] = {"heartbeat_at": now}
    for fact in facts:
        if isinstance(fact.event, AttemptEnded):
            values["ended"] = fact.event.model_dump_json()
    chosen = (attempts.c.job_id == job.id, attempts.c.number == job.attempt)
    connection.execute(update(attempts).where(*chosen).values(values))


def _store_job(
    connection: Connection, job: Job, facts: Sequence[_Fact], known: dict[int, _Rank], now: datetime
) -> None:
    values: dict[str, object] = {"heartbeat_at": now}
    if facts:
        last_steps = [rank.last_step for number, rank in known.items() if number != RUNNER]
        loss = mean_loss(connection, job.id, min(last_steps)) if last_steps else None
        progress = advance(job.progress, [fact.event for fact in facts], max(last_steps, default=0), loss)
        values["progress"] = None if progress is None else progress.model_dump_json()
    connection.execute(update(jobs).where(jobs.c.id == job.id).values(values))
