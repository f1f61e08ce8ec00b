"""JobStore: the one door to the service's memory, for any number of threads."""

from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path
from types import EllipsisType
from typing import Self

from sqlalchemy import select

from service.errors import Conflict
from service.jobs import (
    Attempt,
    Drift,
    Evaluation,
    IngestBatch,
    IngestReply,
    Job,
    JobEvent,
    JobPage,
    JobSpec,
    JobState,
    LogRecord,
    MetricSeries,
    Phase,
    RankStarted,
    Reason,
    ReasonClass,
)
from service.store import attempts, checkups, events, ingest, jobs, logs, pages, steps
from service.store.engine import Database, open_sqlite
from service.store.schema import schema_version


def utc_now() -> datetime:
    """The time of the system, aware."""
    return datetime.now(UTC)


class JobStore:
    """Jobs and all that is known of them.

    Each method is one transaction. Raises: NotFound for what does not exist, StoreUnavailable when the database
    does not answer (locked, disk full); then nothing has changed.
    """

    def __init__(self, database: Database, clock: Callable[[], datetime] = utc_now) -> None:
        self._database = database
        self._clock = clock

    @classmethod
    def open(cls, path: Path, *, busy_timeout_s: float = 5.0, clock: Callable[[], datetime] = utc_now) -> Self:
        """The store in the SQLite file ``path``, made if missing."""
        return cls(open_sqlite(path, busy_timeout_s), clock)

    def close(self) -> None:
        """Let go of the database; later calls raise StoreUnavailable."""
        self._database.close()

    def ping(self) -> None:
        """Return if the database answers."""
        with self._database.read() as connection:
            connection.execute(select(schema_version.c.version)).scalar_one()

    # Jobs

    def create(self, spec: JobSpec, idempotency_key: str | None = None) -> tuple[Job, bool]:
        """A new queued job and True, or the job that the same key and spec made before and False.

        Raises: InvalidRequest where the key was used with another spec.
        """
        with self._database.write() as connection:
            return jobs.create_job(connection, spec, idempotency_key, self._clock())

    def recall(self, spec: JobSpec, idempotency_key: str) -> Job | None:
        """The job that this key and spec made before, if they did. Raises: InvalidRequest as `create` does."""
        with self._database.read() as connection:
            return jobs.recall_job(connection, spec, idempotency_key, self._clock())

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
    ) -> JobPage:
        """A page of jobs, newest first; ``cursor`` is a former page's ``next_cursor``."""
        with self._database.read() as connection:
            return pages.job_page(connection, limit, cursor, states, name, self._clock())

    def unfinished(self) -> list[Job]:
        """Every job that is not terminal, oldest first."""
        with self._database.read() as connection:
            return jobs.unfinished_jobs(connection, self._clock())

    def transition(
        self,
        job: Job,
        to: JobState,
        *,
        phase: Phase | None = None,
        reason: Reason | None = None,
        detail: str = "",
    ) -> Job:
        """Move the job on, with its event. ``version`` counts these moves and nothing else.

        Raises: Conflict where the step is not in `TRANSITIONS`, or the job is no longer what the caller saw.
        """
        with self._database.write() as connection:
            return jobs.change_state(connection, job, to, phase=phase, reason=reason, detail=detail, now=self._clock())

    def describe(
        self,
        job_id: str,
        *,
        phase: Phase | EllipsisType | None = ...,
        reason: Reason | EllipsisType | None = ...,
        detail: str | EllipsisType = ...,
    ) -> Job:
        """Change what is said of the job, not its state; what is left out stays.

        Writes an event only if something changed. Of a terminal job nothing changes any more.
        """
        with self._database.write() as connection:
            return jobs.describe_job(connection, job_id, phase=phase, reason=reason, detail=detail, now=self._clock())

    def observed(self, job_id: str) -> None:
        """Remember that the cluster has just answered about this job."""
        with self._database.write() as connection:
            jobs.set_observed(connection, job_id, self._clock())

    def count_recoveries(self, job_id: str) -> dict[ReasonClass, int]:
        """How often the job went to recovering, by class of reason."""
        with self._database.read() as connection:
            return jobs.count_recoveries(connection, job_id)

    # Attempts

    def start_attempt(self, job: Job) -> tuple[Job, str]:
        """Move a queued or recovering job to starting, in a new attempt with an ingest token of its own.

        From here on older attempts are told to abort. Raises: Conflict as `transition` does.
        """
        if job.state not in (JobState.QUEUED, JobState.RECOVERING):
            raise Conflict(f"{job.id} is {job.state}; only a queued or recovering job starts an attempt")
        with self._database.write() as connection:
            return attempts.start_attempt(connection, job, self._clock())

    def attempt(self, job_id: str, number: int) -> Attempt:
        """An attempt as far as it has reported."""
        with self._database.read() as connection:
            return attempts.get_attempt(connection, job_id, number)

    def ingest(self, attempt_id: str, token: str, batch: IngestBatch) -> IngestReply:
        """Take in what an attempt tells; see `service.store.ingest.ingest`."""
        with self._database.write() as connection:
            return ingest.ingest(connection, attempt_id, token, batch, self._clock())

    # What was told

    def events(self, job_id: str, after_seq: int = 0, limit: int = 500) -> list[JobEvent]:
        """The job's events after number ``after_seq``."""
        with self._database.read() as connection:
            jobs.require_job(connection, job_id)
            return events.events_after(connection, job_id, after_seq, limit)

    def logs(self, job_id: str, after_seq: int = 0, limit: int = 500) -> list[LogRecord]:
        """The job's log lines after number ``after_seq``."""
        with self._database.read() as connection:
            jobs.require_job(connection, job_id)
            return logs.lines_after(connection, job_id, after_seq, limit)

    def append_log(self, job_id: str, attempt: int, rank: int, level: str, text: str) -> None:
        """Add one line to the job's log."""
        with self._database.write() as connection:
            jobs.require_job(connection, job_id)
            logs.append_lines(connection, job_id, [logs.NewLine(self._clock(), attempt, rank, level, text)])

    def metric_names(self, job_id: str) -> list[str]:
        """The metrics that the job has points of."""
        with self._database.read() as connection:
            jobs.require_job(connection, job_id)
            return steps.metric_names(connection, job_id)

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
            return steps.metric_series(connection, job_id, name, rank, first_step, last_step, max_points)

    def start_of(self, job_id: str) -> RankStarted | None:
        """What a rank of the newest attempt said when it was ready to train; None before any was."""
        with self._database.read() as connection:
            jobs.require_job(connection, job_id)
            return checkups.start_of(connection, job_id)

    def evaluations(self, job_id: str) -> list[Evaluation]:
        """Evaluations in order of steps; of a repeated step the latest attempt's."""
        with self._database.read() as connection:
            jobs.require_job(connection, job_id)
            return checkups.evaluations_of(connection, job_id)

    def drift(self, job_id: str) -> list[Drift]:
        """Drift measurements in order of steps; of a repeated step the latest attempt's."""
        with self._database.read() as connection:
            jobs.require_job(connection, job_id)
            return checkups.drift_of(connection, job_id)
