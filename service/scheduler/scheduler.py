"""The one thread that acts: admits queued jobs, follows active ones, and settles those that ended."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path

import structlog
from pydantic import HttpUrl

from service.errors import ClusterUnreachable, Conflict, FieldProblem, StoreUnavailable
from service.jobs import Attempt, Job, JobSpec, JobState, LaunchRequest, Outcome, Reason, attempt_id
from service.scheduler.admission import Admission, QuotaOf, Waiting, admit, unlimited
from service.scheduler.decide import Decision, Evidence, decide, passed_deadline, within_budget
from service.scheduler.launcher import ClusterCapacity, Launcher, Observation
from service.scheduler.leadership import Leadership
from service.scheduler.placement import has_room, placement_problems
from service.scheduler.refusals import Refusals
from service.scheduler.rule_watch import Look, RuleWatch
from service.scheduler.sightings import Sightings
from service.scheduler.wall_clock import WallClock, utc_now
from service.store import JobStore, LeaseLost

_CALM_TICKS = 5
"""While nothing moves, looking less often leaves the processor to those jobs that run on this machine."""

_MOVING = frozenset({JobState.STARTING, JobState.RECOVERING, JobState.PAUSING, JobState.CANCELLING})

_log = structlog.get_logger("scheduler")


class Scheduler:
    """Reconciles what the store says should be with what the cluster says is.

    Every decision is a pure function (`service.scheduler.decide`, `service.scheduler.admission`); this class
    gathers their arguments and carries out what they return. All waits are bounded by the launcher's own. Of several
    on one store only the one that has the lease acts, and the store refuses every write of one that has lost it;
    ``holder`` is its name there (see `Leadership`).
    """

    def __init__(
        self,
        store: JobStore,
        launcher: Launcher,
        *,
        ingest_url: str,
        storage: Path,
        quota_of: QuotaOf = unlimited,
        holder: str | None = None,
        lease_ttl_s: float = 10.0,
        tick_s: float = 0.1,
        observe_every_s: float = 0.5,
        capacity_every_s: float = 5.0,
        rules_every_s: float = 1.0,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._store = store
        self._launcher = launcher
        self._ingest_url = HttpUrl(ingest_url)
        self._storage = storage
        self._quota_of = quota_of
        self._tick_s = tick_s
        self._observe_every_s = observe_every_s
        self._capacity_every_s = capacity_every_s
        self._leadership = Leadership(store, holder, lease_ttl_s)
        self._clock = WallClock(clock)
        self._since = self._clock.now()
        self._capacity: ClusterCapacity | None = None
        self._cluster_error = "the cluster has not answered yet"
        self._capacity_at = float("-inf")
        self._observed_at: dict[str, float] = {}
        self._looked_at = time.monotonic()
        self._heartbeats = Sightings()
        self._steps = Sightings()
        self._refusals = Refusals()
        self._rules = RuleWatch(store, rules_every_s)

    @property
    def cluster_status(self) -> str:
        """The word "ok", or why the cluster cannot be used now."""
        return "ok" if self._capacity is not None else self._cluster_error

    @property
    def gauges(self) -> dict[str, float]:
        """What a monitor should know: whether this one leads, whether the cluster answers, how old its last look is."""
        return {
            "syncbn_cluster_up": float(self._capacity is not None),
            "syncbn_scheduler_leads": float(self._leadership.lease is not None),
            "syncbn_scheduler_tick_age_seconds": time.monotonic() - self._looked_at,
        }

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
        try:
            self._leadership.release()
        except StoreUnavailable as error:
            _log.warning("the lease was not given back; it expires by itself", error=str(error))

    def tick(self) -> bool:
        """Look at every unfinished job once. False if all there is to do is to watch what runs or waits."""
        self._refresh_capacity()
        self._looked_at = time.monotonic()
        led = self._leadership.lease is not None
        if not self._leadership.hold():
            return False
        if not led:
            self._rules.forget_all_but()
        if self._clock.was_set() or not led:
            self._begin_to_listen()
        try:
            return self._look()
        except LeaseLost:
            self._leadership.lose()
            return False

    def _begin_to_listen(self) -> None:
        """Count silence from now on: another scheduler has listened before, or by another time."""
        self._since = self._clock.now()
        self._heartbeats.forget_all_but()
        self._steps.forget_all_but()

    def _look(self) -> bool:
        jobs = self._store.unfinished()
        active = [job for job in jobs if job.state.active]
        self._forget_all_but(active)
        # Observed before the attempts are read: a last word is stored before the cluster sees the process leave.
        observations = self._observe(active)
        attempts = self._store.newest_attempts(active)
        # And the attempts before what they told: one that has ended tells nothing more.
        looks = self._look_at_rules(active, attempts)
        for job in active:
            if not self._leadership.hold():
                return False
            evidence = self._evidence(job, attempts[job.id], observations.get(job.id), looks.get(job.id, Look()))
            self._follow(job, evidence, active)
        started = self._admit_queued(jobs, active)
        at_work = [job for job in jobs if job.state is not JobState.PAUSED]
        return not at_work or started or any(job.state in _MOVING for job in jobs)

    def _refresh_capacity(self) -> None:
        if time.monotonic() - self._capacity_at < self._capacity_every_s:
            return
        try:
            self._capacity = self._launcher.capacity()
        except ClusterUnreachable as error:
            self._capacity, self._cluster_error = None, str(error)
        self._capacity_at = time.monotonic()

    # The queue

    def _admit_queued(self, jobs: Sequence[Job], active: Sequence[Job]) -> bool:
        """Whether a job was started, or failed without one."""
        now = self._clock.now()
        queued = []
        for job in [job for job in jobs if job.state is JobState.QUEUED]:
            if (late := passed_deadline(job, now)) is None:
                queued.append(job)
            else:
                self._transition(job, late)
        if not queued:
            return False
        admission = self._judge(queued, jobs, active)
        for job, why in admission.in_vain:
            self._transition(job, Decision(JobState.FAILED, Reason.JOB_BEFORE_FAILED, why))
        self._say_who_waits(admission.waiting)
        for job in admission.start:
            if not self._leadership.hold():
                break
            self._start(job)
        return bool(admission.start or admission.in_vain)

    def _judge(self, queued: Sequence[Job], jobs: Sequence[Job], active: Sequence[Job]) -> Admission:
        states = {job.id: job.state for job in jobs}
        ended = {name for job in queued for name in job.spec.after} - states.keys()
        return admit(
            queued,
            active,
            self._capacity,
            quota_of=cache(self._quota_of),  # asked for each job, and kept for this one look
            states_before=states | (self._store.states_of(sorted(ended)) if ended else {}),
            cluster_error=self._cluster_error,
        )

    def _say_who_waits(self, waiting: Sequence[Waiting]) -> None:
        # Asked here and not of the store, which would have to lock itself for each waiting job at each tick.
        moved = {w.job.id: w.position for w in waiting if w.job.queue_position != w.position}
        if moved:
            self._store.set_queue_positions(moved, lease=self._leadership.lease)
        for w in waiting:
            if (w.job.phase, w.job.reason, w.job.detail) != (w.phase, w.reason, w.detail):
                self._store.describe(
                    w.job.id,
                    phase=w.phase,
                    reason=w.reason,
                    detail=w.detail,
                    version=w.job.version,
                    lease=self._leadership.lease,
                )

    # Active jobs

    def _evidence(self, job: Job, attempt: Attempt, observation: Observation | None, look: Look) -> Evidence:
        now, name = self._clock.now(), attempt_id(job.id, job.attempt)
        return Evidence(
            attempt=attempt,
            observation=observation,
            now=now,
            listening_since=self._since,
            heard_at=self._heartbeats.since(name, attempt.heartbeat_at, now),
            last_step_at=self._steps.since(name, attempt.last_step, now),
            resumable_step=self._resumable_step(job) if job.state is JobState.PAUSING else None,
            ruling=look.ruling,
            rules_are_behind=look.behind,
        )

    def _look_at_rules(self, active: Sequence[Job], attempts: Mapping[str, Attempt]) -> dict[str, Look]:
        running = [job for job in active if job.state is JobState.RUNNING]
        ends = {job.id: attempts[job.id].ended for job in running}
        finished = {name for name, ended in ends.items() if ended is not None and ended.outcome is Outcome.SUCCEEDED}
        return self._rules.look(running, finished)

    def _follow(self, job: Job, evidence: Evidence, active: Sequence[Job]) -> None:
        decision = decide(job, evidence)
        if decision.to is JobState.RECOVERING:
            decision = within_budget(job, decision, self._store.count_recoveries(job.id))
        if decision.start and self._refusals.hold_back(job.id, time.monotonic()):
            return
        if decision.start:
            decision = self._unless_room_is_gone(job, active, decision)
        try:
            self._carry_out(job, decision)
        except ClusterUnreachable as error:
            _log.warning("the cluster did not answer", job=job.id, error=str(error))

    def _resumable_step(self, job: Job) -> int | None:
        if saved := self._store.checkpoints(job.id):
            return saved[-1].step
        return 0 if job.progress is None or job.progress.step == 0 else None

    def _unless_room_is_gone(self, job: Job, active: Sequence[Job], decision: Decision) -> Decision:
        """Back into the queue where the cluster has shrunk: there it waits in its own place, and says why."""
        others = [other for other in active if other.id != job.id]
        if self._capacity is None or has_room(job, others, self._capacity):
            return decision
        detail = f"the cluster has shrunk: its {job.spec.num_workers} workers no longer fit beside the other jobs"
        return Decision(JobState.QUEUED, Reason.CLUSTER_FULL, detail)

    def _observe(self, active: Sequence[Job]) -> dict[str, Observation]:
        """What the cluster says of those jobs that it has not been asked about for a while."""
        observations: dict[str, Observation] = {}
        for job in active:
            name = attempt_id(job.id, job.attempt)
            if time.monotonic() - self._observed_at.get(name, float("-inf")) < self._observe_every_s:
                continue
            self._observed_at[name] = time.monotonic()
            try:
                observations[job.id] = self._launcher.observe(name)
            except ClusterUnreachable:
                break  # the jobs show it by their growing observed_at and heartbeat ages
        if observations:
            self._store.observed(*observations)
        return observations

    def _forget_all_but(self, active: Sequence[Job]) -> None:
        names = {attempt_id(job.id, job.attempt) for job in active}
        self._observed_at = {name: time for name, time in self._observed_at.items() if name in names}
        self._heartbeats.forget_all_but(names)
        self._steps.forget_all_but(names)
        self._refusals.forget_all_but({job.id for job in active})
        self._rules.forget_all_but({job.id for job in active})

    # What follows

    def _carry_out(self, job: Job, decision: Decision) -> None:
        if decision.stop:
            self._launcher.stop(attempt_id(job.id, job.attempt))
        output = self._launcher.output(attempt_id(job.id, job.attempt)) if decision.keep_output else ""
        if decision.to is not None:
            self._transition(job, decision, output)
        if decision.start:
            self._start(job)

    def _start(self, job: Job) -> None:
        try:
            job, token = self._store.start_attempt(job, lease=self._leadership.lease)
        except LeaseLost:
            raise
        except Conflict:
            return  # cancelled in between; the next tick sees it
        request = LaunchRequest(
            job_id=job.id,
            attempt=job.attempt,
            spec=job.spec,
            ingest_url=self._ingest_url,
            storage=str(self._storage / job.id),
            told_step=self._told_step(job),
            start_checkpoint=job.start_checkpoint,
        )
        _log.info("launching", job=job.id, attempt=job.attempt, workers=job.spec.num_workers)
        try:
            self._launcher.launch(request, token)
            self._refusals.forget(job.id)
        except ClusterUnreachable as error:
            waits_s = self._refusals.note(job.id, time.monotonic())
            detail = f"{error}; asked again in {waits_s:g} s"
            self._transition(job, Decision(JobState.RECOVERING, Reason.CLUSTER_UNREACHABLE, detail))

    def _told_step(self, job: Job) -> int | None:
        told = self._store.told_step(job.id)
        # An earlier attempt may have trained and told nothing at all.
        return 0 if told is None and job.attempt > 1 else told

    def _transition(self, job: Job, decision: Decision, output: str = "") -> None:
        assert decision.to is not None
        try:
            self._store.transition(
                job,
                decision.to,
                phase=decision.phase,
                reason=decision.reason,
                detail=decision.detail,
                output=output,
                lease=self._leadership.lease,
            )
        except LeaseLost:
            raise
        except Conflict:
            return  # someone else moved the job first; the next tick judges it anew
        _log.info("job is now", job=job.id, state=decision.to, reason=decision.reason, detail=decision.detail)
