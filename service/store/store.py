"""JobStore: the one door to the service's memory, for any number of threads."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import EllipsisType
from typing import Self

from pydantic import SecretStr
from sqlalchemy import Connection, literal, select

from service.errors import Conflict
from service.jobs import (
    ANONYMOUS,
    Attempt,
    AuditEntry,
    BatchNormSample,
    CheckpointSaved,
    Drift,
    Evaluation,
    IngestBatch,
    IngestReply,
    Job,
    JobEvent,
    JobPage,
    JobSpec,
    JobState,
    LayerHistory,
    LogRecord,
    MetricSeries,
    Phase,
    RankStarted,
    Reason,
    ReasonClass,
)
from service.store import (
    attempts,
    births,
    checkups,
    events,
    glances,
    ingest,
    jobs,
    layer_history,
    layer_samples,
    leases,
    logs,
    pages,
    series,
    steering,
)
from service.store.api_keys import ApiKeys
from service.store.audit import AuditTrail, append_entry
from service.store.checkups import FactT
from service.store.cursors import cursors_of
from service.store.engine import Database
from service.store.glances import Glance
from service.store.leases import Lease
from service.store.postgresql import open_postgresql
from service.store.principals import Principals
from service.store.retention import Retention, Told, forget, require_told
from service.store.sqlite import open_sqlite
from service.store.step_arrays import Steps
from service.store.steps import store_array
from service.store.webhooks import Webhooks


def utc_now() -> datetime:
    """The time of the system, aware."""
    return datetime.now(UTC)


class JobStore:
    """Jobs and all that is known of them.

    Each method is one transaction. Raises: NotFound for what does not exist, Gone for what of an ended job has been
    forgotten (metrics, logs, and with its events' bodies evaluations and drift), StoreUnavailable when the database
    does not answer (locked, disk full, server away); then nothing has changed, unless the connection to a server
    broke just as it confirmed a change. Every change may be asked for again: none is made twice.
    """

    def __init__(self, database: Database, clock: Callable[[], datetime] = utc_now) -> None:
        self._database = database
        self._clock = clock
        self._parsed: dict[tuple[str, int], JobSpec] = {}
        self.principals = Principals(database, clock)
        self.keys = ApiKeys(database, clock)
        self.webhooks = Webhooks(database, clock)
        self._cursors = cursors_of(database)
        self.audit = AuditTrail(database, self._cursors, clock)

    @classmethod
    def open(cls, path: Path, *, busy_timeout_s: float = 5.0, clock: Callable[[], datetime] = utc_now) -> Self:
        """The store in the SQLite file ``path``, made if missing."""
        return cls(open_sqlite(path, busy_timeout_s), clock)

    @classmethod
    def connect(cls, url: SecretStr, *, busy_timeout_s: float = 5.0, clock: Callable[[], datetime] = utc_now) -> Self:
        """The store in the PostgreSQL database ``url``, made or upgraded if need be; several services may share it."""
        return cls(open_postgresql(url, busy_timeout_s), clock)

    def close(self) -> None:
        """Let go of the database; later calls raise StoreUnavailable."""
        self._database.close()

    def ping(self) -> None:
        """Return if the database answers."""
        with self._database.read() as connection:
            connection.execute(select(literal(1))).scalar_one()

    # Jobs

    def create(
        self,
        spec: JobSpec,
        idempotency_key: str | None = None,
        *,
        owner: str = ANONYMOUS,
        retry_of: str | None = None,
        start_checkpoint: str | None = None,
        record: Callable[[Job], AuditEntry] | None = None,
    ) -> tuple[Job, bool]:
        """A new queued job and True, or the job that the same owner, key and spec made before and False.

        The audit entry that ``record`` makes of a new job is stored with it, or neither is.

        Raises: InvalidRequest where the owner used the key with another spec, or has not the jobs in ``spec.after``;
            TooManyRequests where the owner's quota of waiting jobs is reached.
        """

        def create(connection: Connection) -> tuple[Job, bool]:
            now = self._clock()
            job, created = births.create_job(
                connection,
                spec,
                idempotency_key,
                now,
                owner=owner,
                retry_of=retry_of,
                start_checkpoint=start_checkpoint,
            )
            if created and record is not None:
                append_entry(connection, record(job), now)
            return job, created

        return self._database.transact(create)

    def recall(self, spec: JobSpec, idempotency_key: str, *, owner: str = ANONYMOUS) -> Job | None:
        """The job that this owner, key and spec made before, if they did. Raises: InvalidRequest as `create` does."""
        with self._database.read() as connection:
            return births.recall_job(connection, spec, idempotency_key, owner, self._clock())

    def get(self, job_id: str) -> Job:
        """The job as it stands."""
        with self._database.read() as connection:
            return jobs.get_job(connection, job_id, self._clock())

    def list_jobs(
        self,
        limit: int = 50,
        cursor: str | None = None,
        states: Collection[JobState] | None = None,
        name: str | None = None,
        *,
        owner: str | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
    ) -> JobPage:
        """A page of jobs, newest first; ``cursor`` is a former page's ``next_cursor``.

        The span of time includes ``created_after`` and excludes ``created_before``.
        """
        with self._database.read() as connection:
            return pages.job_page(
                connection,
                self._cursors,
                limit,
                cursor,
                states,
                name,
                self._clock(),
                owner=owner,
                created_after=created_after,
                created_before=created_before,
            )

    def unfinished(self) -> list[Job]:
        """Every job that is not terminal, oldest first."""
        with self._database.read() as connection:
            found = jobs.unfinished_jobs(connection, self._clock(), self._parsed)
        # To parse hundreds of specs is most of what a look at hundreds of jobs would cost.
        self._parsed = {(job.id, job.version): job.spec for job in found}
        return found

    def states_of(self, ids: Iterable[str]) -> dict[str, JobState]:
        """The state of each of these jobs; one that does not exist is absent."""
        with self._database.read() as connection:
            return {job_id: glance.state for job_id, glance in glances.glance_at(connection, ids).items()}

    def transition(
        self,
        job: Job,
        to: JobState,
        *,
        phase: Phase | None = None,
        reason: Reason | None = None,
        detail: str = "",
        stop_saves: bool = False,
        output: str = "",
        lease: Lease | None = None,
    ) -> Job:
        """Move the job on, with its event. ``version`` counts these moves, changes of priority, and forced cancels.

        ``stop_saves`` tells of a move to cancelling, and of no other, that the job shall save first. ``output`` is what
        the attempt that is left behind wrote last; its lines go into the job's log with the move, or not at all.

        Raises: Conflict where the step is not in `TRANSITIONS`, or the job is no longer what the caller saw;
            LeaseLost where ``lease`` is no longer its holder's.
        """

        def move(connection: Connection) -> Job:
            now = self._clock()
            moved = jobs.change_state(
                connection,
                job,
                to,
                phase=phase,
                reason=reason,
                detail=detail,
                now=now,
                stop_saves=stop_saves,
                lease=lease,
            )
            attempts.keep_output(connection, job, output, now)
            return moved

        return self._database.transact(move)

    def describe(
        self,
        job_id: str,
        *,
        phase: Phase | EllipsisType | None = ...,
        reason: Reason | EllipsisType | None = ...,
        detail: str | EllipsisType = ...,
        version: int | None = None,
        lease: Lease | None = None,
    ) -> Job:
        """Change what is said of the job, not its state; what is left out stays.

        Writes an event only if something changed. Of a terminal job nothing changes any more, and with ``version``
        nothing of a job that has another one by now. Raises: LeaseLost.
        """
        return self._database.transact(
            lambda connection: jobs.describe_job(
                connection,
                job_id,
                phase=phase,
                reason=reason,
                detail=detail,
                now=self._clock(),
                version=version,
                lease=lease,
            )
        )

    def set_queue_positions(self, positions: Mapping[str, int | None], lease: Lease | None = None) -> None:
        """Remember the place of each queued job; a job that leaves the queue loses its place by itself.

        Costs one read where nothing has changed. Raises: LeaseLost.
        """
        with self._database.read() as connection:
            changed = steering.changed_positions(connection, positions)
        if changed:
            self._database.transact(lambda connection: steering.set_positions(connection, changed, lease))

    def request_checkpoint(self, job_id: str) -> Job:
        """Ask a starting or running job for a checkpoint, with an event. Raises: Conflict in any other state."""
        return self._database.transact(
            lambda connection: steering.request_checkpoint(connection, job_id, self._clock())
        )

    def force_cancel(self, job: Job) -> Job:
        """Let a job that saves before it is cancelled leave without, with an event. Raises: Conflict."""
        return self._database.transact(lambda connection: steering.force_cancel(connection, job, self._clock()))

    def resume(self, job: Job, num_workers: int | None = None) -> Job:
        """Queue a paused job again; another number of workers shares the same number of images a step.

        Raises: Conflict as `transition` does; InvalidRequest at /num_workers where they cannot be shared so.
        """
        return self._database.transact(
            lambda connection: steering.resume_job(connection, job, num_workers, self._clock())
        )

    def set_priority(self, job: Job, priority: int) -> Job:
        """Change the job's priority, with an event, while it is not terminal; the same again changes nothing.

        Raises: Conflict as `transition` does; InvalidRequest at /priority.
        """
        return self._database.transact(
            lambda connection: steering.set_priority(connection, job, priority, self._clock())
        )

    def observed(self, *job_ids: str) -> None:
        """Remember that the cluster has just answered about these jobs."""
        self._database.transact(lambda connection: jobs.set_observed(connection, job_ids, self._clock()))

    def glances(self, job_ids: Collection[str]) -> dict[str, Glance]:
        """What followers of these jobs need to know, in as few queries as can be; absent for jobs that do not exist."""
        with self._database.read() as connection:
            return glances.glance_at(connection, job_ids)

    def count_by_state(self) -> dict[JobState, int]:
        """How many jobs are in each state; states without any are absent."""
        with self._database.read() as connection:
            return glances.count_by_state(connection)

    def count_recoveries(self, job_id: str) -> dict[ReasonClass, int]:
        """How often the job went to recovering, by class of reason."""
        with self._database.read() as connection:
            return jobs.count_recoveries(connection, job_id)

    # Attempts

    def start_attempt(self, job: Job, lease: Lease | None = None) -> tuple[Job, str]:
        """Move a queued or recovering job to starting, in a new attempt with an ingest token of its own.

        From here on older attempts are told to abort. Raises: Conflict and LeaseLost as `transition` does.
        """
        if job.state not in (JobState.QUEUED, JobState.RECOVERING):
            raise Conflict(f"{job.id} is {job.state}; only a queued or recovering job starts an attempt")
        return self._database.transact(lambda connection: attempts.start_attempt(connection, job, self._clock(), lease))

    def attempt(self, job_id: str, number: int) -> Attempt:
        """An attempt as far as it has reported."""
        with self._database.read() as connection:
            return attempts.get_attempt(connection, job_id, number)

    def told_step(self, job_id: str) -> int | None:
        """How far every rank of the job has told its steps; None before any has begun."""
        with self._database.read() as connection:
            return attempts.told_step(connection, job_id)

    def newest_attempts(self, of: Iterable[Job]) -> dict[str, Attempt]:
        """By job, the attempt that it is in, as far as it has reported; in a few queries for any number of jobs."""
        wanted = [(job.id, job.attempt) for job in of]
        with self._database.read() as connection:
            return attempts.get_attempts(connection, wanted)

    def authorize(self, attempt_id: str, token: str) -> None:
        """Return if the token is the attempt's. Raises: Unauthorized."""
        with self._database.read() as connection:
            attempts.authorize(connection, attempt_id, token)

    def ingest(self, attempt_id: str, token: str, batch: IngestBatch) -> IngestReply:
        """Take in what an attempt tells; see `service.store.ingest.ingest`."""
        return self._database.transact(
            lambda connection: ingest.ingest(connection, attempt_id, token, batch, self._clock())
        )

    # Leases

    def acquire_lease(self, name: str, holder: str, ttl_s: float) -> Lease | None:
        """The lease for ``ttl_s`` from now on; None while another holder's has not expired.

        A holder that asks again keeps its token; see `service.store.leases`.
        """
        return self._database.transact(
            lambda connection: leases.acquire_lease(connection, name, holder, ttl_s, self._clock())
        )

    def renew_lease(self, lease: Lease, ttl_s: float) -> bool:
        """Whether the lease is still its holder's, from now on for ``ttl_s``."""
        return self._database.transact(lambda connection: leases.renew_lease(connection, lease, ttl_s, self._clock()))

    def release_lease(self, lease: Lease) -> None:
        """Let anyone take the lease at once."""
        self._database.transact(lambda connection: leases.release_lease(connection, lease, self._clock()))

    # What was told

    def events(
        self,
        job_id: str,
        after_seq: int = 0,
        limit: int = 500,
        types: Collection[str] | None = None,
        *,
        enough_chars: int | None = None,
    ) -> list[JobEvent]:
        """The job's events after number ``after_seq``, of some types or of all.

        No more follow once their bodies have ``enough_chars`` letters together: a drift of many layers is large.
        """
        with self._database.read() as connection:
            jobs.require_job(connection, job_id)
            return events.events_after(connection, job_id, after_seq, limit, types, enough_chars)

    def logs(self, job_id: str, after_seq: int = 0, limit: int = 500) -> list[LogRecord]:
        """The job's log lines after number ``after_seq``."""
        with self._database.read() as connection:
            jobs.require_job(connection, job_id)
            require_told(connection, job_id, Told.LOGS)
            return logs.lines_after(connection, job_id, after_seq, limit)

    def record_steps(self, job_id: str, attempt: int, steps: Steps) -> None:
        """Store what ranks measured, in bulk; of a step that a rank tells twice the later word counts.

        ``steps`` is an array of `service.store.STEP` in any order; what it says under ``attempt`` is not looked at.
        Cost: 1 us a step where a rank has thousands.
        Raises: Conflict unless the attempt is the newest of a job that has not ended.
        """
        told = steps.copy()
        told["attempt"] = attempt

        def record(connection: Connection) -> None:
            job = jobs.get_job(connection, job_id, self._clock(), lock=True)
            if attempt != job.attempt or job.state.terminal:
                raise Conflict(
                    f"{job_id} is {job.state} in attempt {job.attempt}; attempt {attempt} tells nothing more"
                )
            store_array(connection, job_id, told)

        self._database.transact(record)

    def metric_names(self, job_id: str) -> list[str]:
        """The metrics that the job has points of."""
        with self._database.read() as connection:
            jobs.require_job(connection, job_id)
            require_told(connection, job_id, Told.METRICS)
            return series.metric_names(connection, job_id)

    def metric(
        self,
        job_id: str,
        name: str,
        *,
        rank: int | None = None,
        first_step: int | None = None,
        last_step: int | None = None,
        max_points: int | None = 500,
    ) -> MetricSeries:
        """One metric over steps, of a rank or as the mean over ranks (NaN where any rank is NaN).

        More points than ``max_points`` are thinned, never losing an extreme or the fact that there was a non-finite
        value; None tells all. ``num_points`` says how many there were.
        """
        with self._database.read() as connection:
            jobs.require_job(connection, job_id)
            require_told(connection, job_id, Told.METRICS)
            return series.metric_series(connection, job_id, name, rank, first_step, last_step, max_points)

    def training_loss(self, job_id: str, max_points: int = 100_000) -> MetricSeries:
        """The training loss of the whole run, as the mean over ranks: exact up to ``max_points`` steps.

        Of a longer run the mean of each so many consecutive steps, with every stretch's first non-finite value.
        """
        with self._database.read() as connection:
            jobs.require_job(connection, job_id)
            require_told(connection, job_id, Told.METRICS)
            return series.whole_loss(connection, job_id, max_points)

    def start_of(self, job_id: str) -> RankStarted | None:
        """What a rank of the newest attempt said when it was ready to train; None before any was."""
        with self._database.read() as connection:
            jobs.require_job(connection, job_id)
            require_told(connection, job_id, Told.EVENTS)
            return checkups.start_of(connection, job_id)

    def checkpoints(self, job_id: str) -> list[CheckpointSaved]:
        """The job's checkpoints in order of steps, as its attempts told; the disk keeps only the newest few."""
        with self._database.read() as connection:
            jobs.require_job(connection, job_id)
            return checkups.checkpoints_of(connection, job_id)

    def evaluations(self, job_id: str) -> list[Evaluation]:
        """Evaluations in order of steps; of a repeated step the latest attempt's."""
        with self._database.read() as connection:
            jobs.require_job(connection, job_id)
            require_told(connection, job_id, Told.EVENTS)
            return checkups.evaluations_of(connection, job_id)

    def drift(self, job_id: str) -> list[Drift]:
        """Drift measurements in order of steps; of a repeated step the latest attempt's."""
        with self._database.read() as connection:
            jobs.require_job(connection, job_id)
            require_told(connection, job_id, Told.EVENTS)
            return checkups.drift_of(connection, job_id)

    def facts(self, job_id: str, kind: type[FactT]) -> list[tuple[int, FactT]]:
        """Every fact of one kind that became an event, with the rank that told it, in the order told."""
        with self._database.read() as connection:
            jobs.require_job(connection, job_id)
            require_told(connection, job_id, Told.EVENTS)
            return checkups.facts_of(connection, job_id, kind)

    def evaluated_at(self, job_id: str) -> dict[int, datetime]:
        """When the evaluation at each step was; of a repeated step the first."""
        with self._database.read() as connection:
            jobs.require_job(connection, job_id)
            require_told(connection, job_id, Told.EVENTS)
            return checkups.evaluated_at(connection, job_id)

    def samples(self, job_id: str, newest: int = 500) -> list[tuple[int, BatchNormSample]]:
        """The last so many samples of the layers with their attempts, in the order in which they were taken."""
        with self._database.read() as connection:
            jobs.require_job(connection, job_id)
            require_told(connection, job_id, Told.METRICS)
            return layer_samples.newest_samples(connection, job_id, newest)

    def layer_history(
        self,
        job_id: str,
        *,
        layer: str = "*",
        metrics: Sequence[str] = ("*",),
        first_step: int | None = None,
        last_step: int | None = None,
        max_points: int = 500,
    ) -> LayerHistory:
        """Numbers of the BatchNorm layers over steps; see `service.store.layer_history.layer_history`."""
        with self._database.read() as connection:
            jobs.require_job(connection, job_id)
            require_told(connection, job_id, Told.EVENTS)
            require_told(connection, job_id, Told.METRICS)
            return layer_history.layer_history(connection, job_id, layer, metrics, first_step, last_step, max_points)

    # What is no longer kept

    def forget(self, policy: Retention, interrupted: Callable[[], bool] = lambda: False) -> dict[Told, int]:
        """Forget what ended jobs told longer ago than the policy keeps it; of how many jobs, each.

        Not one transaction but many short ones, until it is ``interrupted``; see `service.store.retention`.
        """
        return forget(self._database, policy, self._clock(), interrupted)
