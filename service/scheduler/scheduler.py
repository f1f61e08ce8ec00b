"""The one thread that acts: admits queued jobs, follows active ones, and settles those that ended."""

import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import structlog
from pydantic import HttpUrl

from service.errors import ClusterUnreachable, Conflict, FieldProblem, StoreUnavailable
from service.jobs import RUNNER, Job, JobSpec, JobState, LaunchRequest, Phase, Reason, attempt_id
from service.scheduler.decide import Decision, decide, queue_deadline_passed
from service.scheduler.launcher import ClusterCapacity, Launcher, Observation
from service.scheduler.placement import admit, placement_problems
from service.store import JobStore

_CALM_TICKS = 5
"""While all jobs run, looking at them less often leaves the processor to those of them that are on this machine."""

_log = structlog.get_logger("scheduler")


class Scheduler:
    """Reconciles what the store says should be with what the cluster says is.

    Every decision is a pure function (`service.scheduler.decide`, `service.scheduler.placement`); this class
    gathers their arguments and carries out what they return. All waits are bounded by the launcher's own.
    """

    def __init__(
        self,
        store: JobStore,
        launcher: Launcher,
        *,
        ingest_url: str,
        storage: Path,
        tick_s: float = 0.1,
        observe_every_s: float = 0.5,
        capacity_every_s: float = 5.0,
    ) -> None:
        self._store = store
        self._launcher = launcher
        self._ingest_url = HttpUrl(ingest_url)
        self._storage = storage
        self._tick_s = tick_s
        self._observe_every_s = observe_every_s
        self._capacity_every_s = capacity_every_s
        self._since = datetime.now(UTC)
        self._capacity: ClusterCapacity | None = None
        self._cluster_error = "the cluster has not answered yet"
        self._capacity_at = float("-inf")
        self._observed_at: dict[str, float] = {}

    @property
    def cluster_status(self) -> str:
        """The word "ok", or why the cluster cannot be used now."""
        return "ok" if self._capacity is not None else self._cluster_error

    def placement_problems(self, spec: JobSpec) -> Sequence[FieldProblem]:
        """Why the cluster could never hold the job, as far as its size is known."""
        return placement_problems(spec, self._capacity) if self._capacity is not None else []

    def run(self, stopping: threading.Event) -> None:
        """Tick until ``stopping`` is set. A store that fails for a while is waited for, never given up on."""
        while not stopping.is_set():
            in_motion = True
            try:
                in_motion = self.tick()
            except StoreUnavailable as error:
                _log.warning("the store does not answer", error=str(error))
            stopping.wait(self._tick_s if in_motion else _CALM_TICKS * self._tick_s)

    def tick(self) -> bool:
        """Look at every unfinished job once. False if all there is to do is to watch jobs that run."""
        self._refresh_capacity()
        jobs = self._store.unfinished()
        for job in jobs:
            if job.state.active:
                self._follow(job)
        self._admit_queued(jobs)
        return not jobs or any(job.state is not JobState.RUNNING for job in jobs)

    def _refresh_capacity(self) -> None:
        if time.monotonic() - self._capacity_at < self._capacity_every_s:
            return
        try:
            self._capacity = self._launcher.capacity()
        except ClusterUnreachable as error:
            self._capacity, self._cluster_error = None, str(error)
        self._capacity_at = time.monotonic()

    def _admit_queued(self, jobs: Sequence[Job]) -> None:
        now = datetime.now(UTC)
        queued = [job for job in jobs if job.state is JobState.QUEUED]
        for job in [job for job in queued if queue_deadline_passed(job, now)]:
            queued.remove(job)
            detail = f"it waited longer than its queue_s of {job.spec.timeouts.queue_s:g} s; {job.detail}"
            self._transition(job, Decision(JobState.FAILED, Reason.QUEUE_DEADLINE, detail))
        if not queued:
            return
        if self._capacity is None:
            for job in queued:
                self._say_why_waiting(job, Phase.WAITING_CLUSTER, Reason.CLUSTER_UNREACHABLE, self._cluster_error)
            return
        admission = admit(queued, [job for job in jobs if job.state.active], self._capacity)
        for job, why in admission.waiting:
            self._say_why_waiting(job, Phase.WAITING_RESOURCES, Reason.CLUSTER_FULL, why)
        for job in admission.start:
            self._start(job)

    def _say_why_waiting(self, job: Job, phase: Phase, reason: Reason, detail: str) -> None:
        # Asked here and not of the store, which would have to lock itself for each waiting job at each tick.
        if (job.phase, job.reason, job.detail) != (phase, reason, detail):
            self._store.describe(job.id, phase=phase, reason=reason, detail=detail)

    def _follow(self, job: Job) -> None:
        # Observed before the attempt is read: a last word is stored before the cluster sees the process leave.
        observation = self._observe(job)
        attempt = self._store.attempt(job.id, job.attempt)
        recoveries = self._store.count_recoveries(job.id)
        decision = decide(job, attempt, observation, recoveries, datetime.now(UTC), self._since)
        try:
            self._carry_out(job, decision)
        except ClusterUnreachable as error:
            _log.warning("the cluster did not answer", job=job.id, error=str(error))

    def _observe(self, job: Job) -> Observation | None:
        name = attempt_id(job.id, job.attempt)
        if time.monotonic() - self._observed_at.get(name, float("-inf")) < self._observe_every_s:
            return None
        self._observed_at[name] = time.monotonic()
        try:
            observation = self._launcher.observe(name)
        except ClusterUnreachable:
            return None  # the job shows it by its growing observed_at and heartbeat ages
        self._store.observed(job.id)
        return observation

    def _carry_out(self, job: Job, decision: Decision) -> None:
        if decision.stop:
            self._launcher.stop(attempt_id(job.id, job.attempt))
        if decision.keep_output:
            self._keep_output(job)
        if decision.to is not None:
            self._transition(job, decision)
        if decision.start:
            self._start(job)

    def _start(self, job: Job) -> None:
        try:
            job, token = self._store.start_attempt(job)
        except Conflict:
            return  # cancelled in between; the next tick sees it
        request = LaunchRequest(
            job_id=job.id,
            attempt=job.attempt,
            spec=job.spec,
            ingest_url=self._ingest_url,
            storage=str(self._storage / job.id),
        )
        _log.info("launching", job=job.id, attempt=job.attempt, workers=job.spec.num_workers)
        try:
            self._launcher.launch(request, token)
        except ClusterUnreachable as error:
            self._transition(job, Decision(JobState.RECOVERING, Reason.CLUSTER_UNREACHABLE, str(error)))

    def _transition(self, job: Job, decision: Decision) -> None:
        assert decision.to is not None
        try:
            self._store.transition(
                job, decision.to, phase=decision.phase, reason=decision.reason, detail=decision.detail
            )
        except Conflict:
            return  # someone else moved the job first; the next tick judges it anew
        _log.info("job is now", job=job.id, state=decision.to, reason=decision.reason, detail=decision.detail)

    def _keep_output(self, job: Job) -> None:
        for line in self._launcher.output(attempt_id(job.id, job.attempt)).splitlines():
            self._store.append_log(job.id, job.attempt, RUNNER, "info", line)
