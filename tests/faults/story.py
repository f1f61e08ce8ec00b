"""A day of a service: jobs are submitted, run, fail, are paused, resized, resumed and cancelled, and end.

Whoever takes part asks again for what it has got no answer to, as clients and runners do, so the story can be begun
anew at any point and comes to the same end.
"""

import json
from collections.abc import Callable
from pathlib import Path

from service.jobs import (
    RUNNER,
    AttemptEnded,
    CheckpointSaved,
    Control,
    IngestBatch,
    Job,
    JobSpec,
    JobState,
    LogLine,
    Outcome,
    RankBatch,
    TelemetryEvent,
    job_of_attempt,
)
from service.scheduler import LaunchState, Scheduler
from service.store import JobStore
from tests.faults.history import all_events, path_of
from tests.faults.journal_cluster import JournalCluster
from tests.service.store.telling import rank_batch, started, step

NUM_STEPS = 6
MAX_TICKS = 40

ENDS = {"steered": JobState.SUCCEEDED, "unlucky": JobState.SUCCEEDED, "unwanted": JobState.CANCELLED}
"""Name of each job, and how it must end."""


def loss_of(rank: int, number: int) -> float:
    return (rank + 1) / number


class Story:
    """One telling of the story over ``store`` and ``cluster``; ``acknowledged`` notes what was answered."""

    def __init__(self, store: JobStore, cluster: JournalCluster, folder: Path) -> None:
        self._store = store
        self._cluster = cluster
        self._answers = folder / "answers.jsonl"
        self._unlucky_failed = False
        self._scheduler = Scheduler(
            store,
            cluster,
            ingest_url="http://127.0.0.1:1",
            storage=folder,
            holder="the only one here",
            observe_every_s=0,
            capacity_every_s=0,
        )

    def tell(self) -> None:
        steered = self._submit("steered", num_workers=2)
        unlucky = self._submit("unlucky", num_workers=1)
        unwanted = self._submit("unwanted", num_workers=1, after=(steered,))
        self._until(lambda: all(self._has_been(job_id, JobState.RUNNING) for job_id in (steered, unlucky)), 3)
        self._lose_runner_once(unlucky)
        self._move_once(steered, JobState.PAUSING)
        self._until(lambda: self._has_been(steered, JobState.PAUSED), 3)
        self._resume(steered)
        self._move_once(unwanted, JobState.CANCELLED)
        self._until(lambda: all(self._store.get(job_id).state.terminal for job_id in (steered, unlucky)), NUM_STEPS)

    def answered(self) -> list[list[str]]:
        """What was asked for and answered, over all tellings."""
        if not self._answers.exists():
            return []
        return [json.loads(line) for line in self._answers.read_text().splitlines()]

    # Clients

    def _submit(self, name: str, **fields: object) -> str:
        spec = JobSpec.model_validate({"name": name, "max_steps": NUM_STEPS, **fields})
        job, _ = self._store.create(spec, idempotency_key=name)
        self._note("queued", job.id)
        return job.id

    def _move_once(self, job_id: str, to: JobState) -> None:
        if not self._has_been(job_id, to):
            self._store.transition(self._store.get(job_id), to)
            self._note(to, job_id)

    def _resume(self, job_id: str) -> None:
        job = self._store.get(job_id)
        if job.state is JobState.PAUSED:
            self._store.resume(job, num_workers=1)

    def _note(self, state: str, job_id: str) -> None:
        with self._answers.open("a") as file:
            file.write(json.dumps([state, job_id]) + "\n")

    def _has_been(self, job_id: str, state: JobState) -> bool:
        return state in path_of(all_events(self._store, job_id))

    def _until(self, reached: Callable[[], bool], num_steps: int) -> None:
        for _ in range(MAX_TICKS):
            if reached():
                return
            self._scheduler.tick()
            self._report(num_steps)
        raise AssertionError(f"not reached after {MAX_TICKS} looks: {self._store.unfinished()}")

    # Runners

    def _lose_runner_once(self, job_id: str) -> None:
        if self._store.get(job_id).attempt == 1 and f"{job_id}-1" in self._cluster.alive():
            self._cluster.finish(f"{job_id}-1", LaunchState.FAILED)

    def _report(self, num_steps: int) -> None:
        """Every runner tells again all that it has told, and what is new; it leaves when it has ended."""
        for attempt, token in self._cluster.alive().items():
            job_id, number = job_of_attempt(attempt)
            facts = _facts(self._store.get(job_id), self._saved_before(job_id, number), num_steps)
            control = self._post(attempt, token, *facts)
            ended = _end(control, num_steps)
            if ended is not None:
                self._post(attempt, token, rank_batch(ended, RUNNER))
                self._cluster.finish(attempt, LaunchState.SUCCEEDED)

    def _saved_before(self, job_id: str, attempt: int) -> int:
        """The step that the attempt goes on from."""
        events = all_events(self._store, job_id)
        return max((e.body["step"] for e in events if e.type == "checkpoint" and (e.attempt or 0) < attempt), default=0)

    def _post(self, attempt: str, token: str, *parts: RankBatch) -> Control:
        return self._store.ingest(attempt, token, IngestBatch(batches=parts)).control


def _facts(job: Job, resumed_step: int, num_steps: int) -> list[RankBatch]:
    numbers = range(resumed_step + 1, num_steps + 1)
    return [
        rank_batch(
            [
                started(resumed_step, NUM_STEPS),
                LogLine(text=f"rank {rank}"),
                *(step(number, loss=loss_of(rank, number)) for number in numbers),
            ],
            rank,
        )
        for rank in range(job.spec.num_workers)
    ]


def _end(control: Control, num_steps: int) -> list[TelemetryEvent] | None:
    if control is Control.STOP:
        saved = CheckpointSaved(step=num_steps, path="/storage/step.pt", size_bytes=1, duration_s=0.1)
        return [saved, AttemptEnded(outcome=Outcome.STOPPED, checkpoint_step=num_steps)]
    if control is Control.ABORT:
        return [AttemptEnded(outcome=Outcome.STOPPED)]
    return [AttemptEnded(outcome=Outcome.SUCCEEDED)] if num_steps == NUM_STEPS else None
