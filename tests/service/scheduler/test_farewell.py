"""Leaving in order: what runs tells its last word while somebody listens."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.errors import ClusterUnreachable
from service.jobs import AttemptEnded, JobSpec, JobState, LaunchRequest, Outcome, Reason
from service.scheduler import Scheduler, ScriptedLauncher
from service.scheduler.farewell import let_attempts_leave, set_aside
from service.store import JobStore
from tests.service.store.telling import batch, started


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore.open(tmp_path / "jobs.sqlite")
    yield store
    store.close()


class Cluster(ScriptedLauncher):
    """A scripted launcher whose attempts tell ``last_word`` once they are stopped, a moment later."""

    def __init__(self, store: JobStore, last_word: AttemptEnded | None) -> None:
        super().__init__(on_launch=self._begin)
        self._store = store
        self._last_word = last_word
        self._tokens: dict[str, str] = {}
        self.timers: list[threading.Timer] = []

    def _begin(self, request: LaunchRequest, token: str) -> None:
        self._tokens[request.attempt_id] = token
        for rank in range(request.spec.num_workers):
            self._store.ingest(request.attempt_id, token, batch([started()], rank))

    def stop(self, attempt_id: str) -> None:
        super().stop(attempt_id)
        if self._last_word is not None:
            words = (attempt_id, self._tokens[attempt_id], batch([self._last_word], -1))
            self.timers.append(threading.Timer(0.2, self._store.ingest, words))
            self.timers[-1].start()


def run_one(store: JobStore, cluster: Cluster, tmp_path: Path) -> tuple[str, Scheduler]:
    """A job in its first attempt, whose ranks have begun, and who scheduled it."""
    job, _ = store.create(JobSpec(name="t", epochs=1))
    ticker = Scheduler(store, cluster, ingest_url="http://127.0.0.1:1", storage=tmp_path)
    ticker.tick()
    ticker.tick()
    assert store.get(job.id).state is JobState.RUNNING
    return job.id, ticker


def leave(store: JobStore, cluster: Cluster, timeout_s: float = 10.0, hurried: bool = False) -> None:
    let_attempts_leave(store, cluster, timeout_s, lambda: hurried)
    set_aside(store)
    for timer in cluster.timers:
        timer.join(10)


def test_a_running_job_saves_and_waits_for_the_next_start(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store, AttemptEnded(outcome=Outcome.STOPPED, checkpoint_step=42))
    job_id, _ = run_one(store, cluster, tmp_path)
    leave(store, cluster)
    job = store.get(job_id)
    assert (job.state, job.reason) == (JobState.RECOVERING, Reason.SERVICE_STOPPED)
    assert "having saved at step 42" in job.detail


def test_a_job_that_finished_meanwhile_is_not_taken_up_again(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store, AttemptEnded(outcome=Outcome.SUCCEEDED))
    job_id, ticker = run_one(store, cluster, tmp_path)
    leave(store, cluster)
    assert store.get(job_id).state is JobState.RUNNING
    ticker.tick()
    assert store.get(job_id).state is JobState.SUCCEEDED


@pytest.mark.parametrize(("timeout_s", "hurried"), [(0.1, False), (60.0, True)])
def test_nobody_waits_for_ever(store: JobStore, tmp_path: Path, timeout_s: float, hurried: bool) -> None:
    cluster = Cluster(store, None)
    job_id, _ = run_one(store, cluster, tmp_path)
    leave(store, cluster, timeout_s, hurried)
    assert store.get(job_id).state is JobState.RECOVERING
    assert "having saved" not in store.get(job_id).detail


def test_a_cluster_that_does_not_answer_is_not_waited_for(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store, None)
    run_one(store, cluster, tmp_path)
    cluster.reachable = False
    with pytest.raises(ClusterUnreachable):
        let_attempts_leave(store, cluster, 60.0, lambda: False)
