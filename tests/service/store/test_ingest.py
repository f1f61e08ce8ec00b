import math
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from service.errors import InvalidRequest, Unauthorized
from service.jobs import (
    RUNNER,
    AttemptEnded,
    CheckpointSaved,
    Control,
    IngestBatch,
    Job,
    JobState,
    LogLine,
    Outcome,
    Phase,
    PhaseChanged,
    RankBatch,
    Reason,
    TelemetryEvent,
    attempt_id,
)
from service.store import JobStore
from service.store.schema import metadata
from tests.service.store.clock import Clock
from tests.service.store.telling import TIME, batch, drift, evaluation, rank_batch, spec, started, step

CONTINUE, ABORT = Control.CONTINUE, Control.ABORT


class Attempt:
    """A started attempt, with its token at hand."""

    def __init__(self, store: JobStore, job: Job | None = None) -> None:
        self.store = store
        self.job, self.token = store.start_attempt(job or store.create(spec())[0])
        self.name = attempt_id(self.job.id, self.job.attempt)

    def tell(self, *events: TelemetryEvent, rank: int = 0, first_seq: int = 0) -> tuple[Control, dict[int, int]]:
        return self.post(batch(events, rank, first_seq))

    def post(self, told: IngestBatch) -> tuple[Control, dict[int, int]]:
        reply = self.store.ingest(self.name, self.token, told)
        return reply.control, reply.next_seq

    def losses(self, rank: int | None = None) -> dict[int, float]:
        series = self.store.metric(self.job.id, "train/loss", rank=rank)
        return dict(zip(series.steps, series.values, strict=True))

    def event_types(self) -> list[str]:
        return [event.type for event in self.store.events(self.job.id)][2:]  # without queued and starting


@pytest.fixture
def attempt(store: JobStore) -> Attempt:
    return Attempt(store)


def test_a_wrong_token_or_attempt_is_refused_and_nothing_stored(store: JobStore, attempt: Attempt) -> None:
    other = Attempt(store)
    for name, token in [
        (attempt.name, other.token),
        (attempt.name, ""),
        (attempt.name, attempt.token.upper()),
        (f"{attempt.job.id}-2", attempt.token),
        ("nonsense", attempt.token),
    ]:
        with pytest.raises(Unauthorized, match="ingest token"):
            store.ingest(name, token, batch([step(1)]))
    assert attempt.losses() == {}


def test_no_token_can_be_read_back(store: JobStore, attempt: Attempt) -> None:
    assert len(bytes.fromhex(attempt.token)) == 32
    with store._database.read() as connection:
        stored = str([connection.execute(select(table)).all() for table in metadata.sorted_tables])
    assert attempt.name.split("-")[0] in stored
    assert attempt.token not in stored


def test_every_kind_of_fact_goes_where_it_is_read(store: JobStore, attempt: Attempt, clock: Clock) -> None:
    saved = CheckpointSaved(step=2, path="here", size_bytes=3, duration_s=0.5)
    control, next_seq = attempt.tell(
        started(), PhaseChanged(phase=Phase.TRAINING), step(1, 2.0), LogLine(text="hello"), step(2, 1.0), saved
    )
    assert (control, next_seq) == (CONTINUE, {0: 6})
    assert attempt.event_types() == ["rank_started", "phase_changed", "checkpoint"]
    assert attempt.losses(rank=0) == {1: 2.0, 2: 1.0}
    (line,) = store.logs(attempt.job.id)
    assert (line.seq, line.attempt, line.rank, line.level, line.text) == (1, 1, 0, "info", "hello")
    assert line.time.timestamp() == TIME
    event = store.events(attempt.job.id)[-1]
    assert (event.attempt, event.rank, event.time.timestamp()) == (1, 0, TIME)
    assert CheckpointSaved.model_validate(event.body) == saved
    job = store.get(attempt.job.id)
    assert (job.phase, job.version, job.heartbeat_at) == (Phase.TRAINING, attempt.job.version, clock.now)


def test_an_attempt_tells_how_far_it_came(store: JobStore, attempt: Attempt, clock: Clock) -> None:
    before = store.attempt(attempt.job.id, 1)
    assert (before.heartbeat_at, before.num_ranks_started, before.last_step, before.ended) == (None, 0, 0, None)
    clock.advance(2)
    attempt.post(IngestBatch(batches=(rank_batch([started()], 0), rank_batch([started(), step(4)], 1))))
    ended = AttemptEnded(outcome=Outcome.FAILED, reason=Reason.WORKER_LOST, detail="rank 1 died")
    attempt.tell(ended, rank=RUNNER)
    after = store.attempt(attempt.job.id, 1)
    assert (after.heartbeat_at, after.num_ranks_started, after.last_step) == (clock.now, 2, 4)
    assert after.ended == ended
    assert attempt.event_types() == ["rank_started", "rank_started", "attempt_ended"]


def test_a_repeated_batch_is_stored_once(attempt: Attempt) -> None:
    facts = (started(), step(1), LogLine(text="once"), evaluation(1))
    for _ in range(3):
        assert attempt.tell(*facts) == (CONTINUE, {0: 4})
    assert attempt.event_types() == ["rank_started", "evaluation"]
    assert len(attempt.store.logs(attempt.job.id)) == 1


def test_a_gap_is_remembered_and_filled_from_next_seq_on(attempt: Attempt) -> None:
    lines = [LogLine(text=str(number)) for number in range(6)]
    assert attempt.tell(*lines[:1]) == (CONTINUE, {0: 1})
    assert attempt.tell(*lines[4:], first_seq=4) == (CONTINUE, {0: 1})
    assert attempt.tell(*lines[1:], first_seq=1) == (CONTINUE, {0: 6})
    texts = [record.text for record in attempt.store.logs(attempt.job.id)]
    assert sorted(texts) == ["0", "1", "2", "3", "4", "5"]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 20), st.integers(0, 12)), max_size=12),
    seed=st.integers(0, 99),
)
def test_whatever_is_repeated_or_reordered_each_fact_is_stored_once(
    store: JobStore, parts: list[tuple[int, int, int]], seed: int
) -> None:
    attempt = Attempt(store)
    facts = [step(n + 1, loss=float(n)) if n % 2 else LogLine(text=str(n)) for n in range(20)]
    everything = [(rank, first, 7) for rank in (0, 1) for first in (0, 7, 14)]
    sent = [*parts, *everything]
    random.Random(seed).shuffle(sent)
    for rank, first, size in sent:
        attempt.tell(*facts[first : first + size], rank=rank, first_seq=first)
    assert attempt.post(IngestBatch(batches=())) == (CONTINUE, {0: 20, 1: 20})
    expected = {n + 1: float(n) for n in range(1, 20, 2)}
    assert attempt.losses(rank=0) == attempt.losses(rank=1) == expected
    lines = [(record.rank, int(record.text)) for record in store.logs(attempt.job.id)]
    assert sorted(lines) == [(rank, n) for rank in (0, 1) for n in range(0, 20, 2)]
    assert [record.seq for record in store.logs(attempt.job.id)] == list(range(1, 21))


def test_threads_that_send_the_same_batches_leave_each_fact_once(attempt: Attempt) -> None:
    barrier = threading.Barrier(4)

    def send(_: int) -> None:
        barrier.wait(10)
        for first in range(0, 60, 10):
            attempt.tell(*[LogLine(text=str(first + n)) for n in range(10)], first_seq=first)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(send, range(4)))
    assert [int(record.text) for record in attempt.store.logs(attempt.job.id)] == list(range(60))


def test_non_finite_numbers_come_back_as_they_went_in(store: JobStore, attempt: Attempt) -> None:
    attempt.tell(
        started(),
        step(1, math.nan),
        step(2, math.inf),
        step(3, -math.inf),
        evaluation(3, math.nan),
        drift(3, bn=math.nan),
    )
    values = attempt.losses(rank=0)
    assert math.isnan(values[1])
    assert (values[2], values[3]) == (math.inf, -math.inf)
    (told,) = store.evaluations(attempt.job.id)
    assert math.isnan(told.stored.loss)
    assert math.isnan(told.loss_damage_se)
    (layer,) = store.drift(attempt.job.id)[0].layers
    assert math.isnan(layer.rms_mean_shift)
    assert layer.output_error == math.inf
    progress = store.get(attempt.job.id).progress
    assert progress is not None
    assert progress.train_loss == -math.inf
    assert progress.validation_loss is not None
    assert math.isnan(progress.validation_loss)


def test_a_heartbeat_makes_a_job_fresh_and_silence_stale(store: JobStore, attempt: Attempt, clock: Clock) -> None:
    assert (store.get(attempt.job.id).heartbeat_age_s, store.get(attempt.job.id).stale) == (None, False)
    attempt.post(IngestBatch(batches=()))
    clock.advance(15)
    assert (store.get(attempt.job.id).heartbeat_age_s, store.get(attempt.job.id).stale) == (15, False)
    clock.advance(0.5)
    assert (store.get(attempt.job.id).heartbeat_age_s, store.get(attempt.job.id).stale) == (15.5, True)
    job = store.transition(store.get(attempt.job.id), JobState.FAILED)
    assert not job.stale


def test_an_older_attempt_is_told_to_abort_and_not_listened_to(store: JobStore, attempt: Attempt) -> None:
    attempt.tell(step(1))
    job = store.transition(attempt.job, JobState.RECOVERING, reason=Reason.WORKER_LOST)
    newer = Attempt(store, job)
    assert newer.token != attempt.token
    assert store.get(job.id).heartbeat_at is None
    assert attempt.tell(step(2), first_seq=1) == (ABORT, {0: 1})
    assert newer.tell(started(resumed_step=1)) == (CONTINUE, {0: 1})
    assert attempt.losses() == {1: 1.0}


@pytest.mark.parametrize("state", [JobState.CANCELLING, JobState.RECOVERING])
def test_the_newest_attempt_of_a_job_that_ends_it_is_still_listened_to(
    store: JobStore, attempt: Attempt, state: JobState
) -> None:
    store.transition(attempt.job, state)
    ended = AttemptEnded(outcome=Outcome.STOPPED)
    assert attempt.tell(step(1), ended) == (ABORT, {0: 2})
    assert attempt.losses() == {1: 1.0}
    assert store.attempt(attempt.job.id, 1).ended == ended


def test_a_terminal_job_never_changes_again(store: JobStore, attempt: Attempt) -> None:
    job = store.transition(attempt.job, JobState.FAILED, reason=Reason.NO_HEARTBEAT)
    assert attempt.tell(step(1), PhaseChanged(phase=Phase.TRAINING), LogLine(text="late")) == (ABORT, {})
    assert store.get(job.id) == job
    assert attempt.losses() == {}
    assert store.logs(job.id) == []


def test_a_late_phase_does_not_overwrite_what_the_scheduler_says(store: JobStore, attempt: Attempt) -> None:
    store.transition(attempt.job, JobState.RECOVERING, phase=Phase.WAITING_RESOURCES)
    attempt.tell(PhaseChanged(phase=Phase.TRAINING))
    assert store.get(attempt.job.id).phase is Phase.WAITING_RESOURCES


def test_what_a_later_attempt_repeats_replaces_the_earlier_word(store: JobStore, attempt: Attempt) -> None:
    for rank in (0, 1):
        attempt.tell(*[step(n, loss=1.0) for n in range(1, 7)], evaluation(3), evaluation(6), rank=rank)
    later = Attempt(store, store.transition(attempt.job, JobState.RECOVERING))
    later.tell(started(resumed_step=2), step(3, 5.0), step(4, 5.0), evaluation(3, loss=9.0))
    assert later.losses(rank=0) == {1: 1.0, 2: 1.0, 3: 5.0, 4: 5.0, 5: 1.0, 6: 1.0}
    # The mean never mixes the attempts, even though rank 1 has not told its steps again yet.
    assert later.losses() == later.losses(rank=0)
    assert [(told.step, told.stored.loss) for told in store.evaluations(attempt.job.id)] == [(3, 9.0), (6, 0.5)]


def test_a_step_that_one_attempt_tells_twice_counts_once(attempt: Attempt) -> None:
    attempt.tell(step(1, 1.0), step(2, 1.0), step(2, 2.0))
    attempt.tell(step(2, 3.0), first_seq=3)
    assert attempt.losses() == {1: 1.0, 2: 3.0}


@pytest.mark.parametrize(
    ("wrong", "pointers"),
    [
        ([rank_batch([step(1)], rank=2)], ["/batches/0/rank"]),
        ([RankBatch(rank=0, first_seq=0, times=(math.nan,), events=(step(1),))], ["/batches/0/times"]),
        ([rank_batch([step(2**40)])], ["/batches/0/events"]),
        ([rank_batch([step(1)]), rank_batch([step(1), step(-1)], rank=7)], ["/batches/1/rank", "/batches/1/events"]),
    ],
)
def test_a_batch_that_cannot_be_true_is_refused_whole(
    attempt: Attempt, wrong: Sequence[RankBatch], pointers: list[str]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        attempt.post(IngestBatch(batches=tuple(wrong)))
    assert [problem.pointer for problem in caught.value.problems] == pointers
    assert attempt.post(IngestBatch(batches=())) == (CONTINUE, {})


def test_progress_follows_the_ranks(store: JobStore, attempt: Attempt) -> None:
    attempt.tell(step(1))
    assert store.get(attempt.job.id).progress is None  # how many steps there are is not known yet
    attempt.post(
        IngestBatch(
            batches=(
                rank_batch([started(), step(2, 3.0, 0.5), step(3, 9.0, 0.5)], 0, first_seq=1),
                rank_batch([started(), step(1, 1.0, 0.5), step(2, 1.0, 0.5)], 1),
            )
        )
    )
    progress = store.get(attempt.job.id).progress
    assert progress is not None
    assert (progress.step, progress.total_steps, progress.epoch) == (3, 100, 0)
    assert progress.train_loss == 2.0  # step 2 is the newest that every rank has told
    assert progress.step_s == 0.5
    assert progress.remaining_s == 0.5 * 97
    attempt.tell(evaluation(3, 0.25, 0.875), drift(3, a=0.5, b=2.5, c=1.0), first_seq=4)
    progress = store.get(attempt.job.id).progress
    assert progress is not None
    assert (progress.validation_loss, progress.validation_accuracy, progress.worst_layer_drift) == (0.25, 0.875, 2.5)
    assert progress.train_loss == 2.0


def test_the_start_that_is_told_is_the_newest_attempts(store: JobStore, attempt: Attempt) -> None:
    assert store.start_of(attempt.job.id) is None
    attempt.tell(started())
    later = Attempt(store, store.transition(attempt.job, JobState.RECOVERING))
    later.tell(started(resumed_step=7))
    assert store.start_of(attempt.job.id) == started(resumed_step=7)
