"""Rules of jobs over a real store: what the scheduler follows, what it acts on, and what it reads again."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from service.jobs import AttemptEnded, Control, Job, JobState, NonFinite, NonFinitePlace, Outcome, Reason
from service.scheduler import LaunchState
from service.scheduler.rule_watch import Look, RuleWatch
from service.store import STEP, JobStore
from tests.service.scheduler.test_rules import exceeded
from tests.service.scheduler.test_scheduler import Cluster, run, scheduler, seen
from tests.service.store.telling import evaluation, started, step

TARGET = {"stop_when": ["target"], "target": {"value": 0.9}}
SUCCEEDED = AttemptEnded(outcome=Outcome.SUCCEEDED)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore.open(tmp_path / "jobs.sqlite")
    yield store
    store.close()


def leave(store: JobStore, cluster: Cluster, job: Job, ended: AttemptEnded) -> None:
    """Let the newest attempt say its last word and go."""
    name = f"{job.id}-{store.get(job.id).attempt}"
    cluster.report(name, ended)
    cluster.finish(name, LaunchState.SUCCEEDED)


def test_a_job_at_its_target_saves_and_succeeds(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    ticker = scheduler(store, cluster, tmp_path, rules_every_s=0)
    job = run(store, cluster, ticker, **TARGET)
    for number in (10, 20, 30):
        ticker.tick()
        assert store.get(job.id).state is JobState.RUNNING
        cluster.report(f"{job.id}-1", evaluation(number, accuracy=0.95))
    ticker.tick()
    assert seen(store, job) == (JobState.PAUSING, Reason.TARGET_REACHED)
    assert cluster.report(f"{job.id}-1") is Control.STOP
    leave(store, cluster, job, AttemptEnded(outcome=Outcome.STOPPED, checkpoint_step=31))
    ticker.tick()
    done = store.get(job.id)
    assert (done.state, done.reason) == (JobState.SUCCEEDED, Reason.TARGET_REACHED)
    assert done.detail == (
        "Reached accuracy 0.9 after step 10, 640 images; the next 2 evaluations confirm it. Saved at step 31"
    )


def test_a_save_that_fails_lets_the_job_go_on_until_its_rule_holds_again(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    ticker = scheduler(store, cluster, tmp_path, rules_every_s=0)
    job = run(store, cluster, ticker, **TARGET)
    cluster.report(f"{job.id}-1", *(evaluation(number, accuracy=0.95) for number in (10, 20, 30)))
    ticker.tick()
    leave(store, cluster, job, AttemptEnded(outcome=Outcome.FAILED, reason=Reason.WORKER_LOST, detail="rank 1 died"))
    ticker.tick()
    assert seen(store, job) == (JobState.RECOVERING, Reason.WORKER_LOST)
    ticker.tick()
    for rank in (0, 1):
        cluster.report(f"{job.id}-2", started(resumed_step=20), rank=rank)
    ticker.tick()
    ticker.tick()
    assert store.get(job.id).state is JobState.RUNNING
    cluster.report(f"{job.id}-2", evaluation(30, accuracy=0.95))
    ticker.tick()
    assert seen(store, job) == (JobState.PAUSING, Reason.TARGET_REACHED)


def test_a_diverged_job_fails_and_is_stopped_naming_step_rank_and_tensor(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    ticker = scheduler(store, cluster, tmp_path, rules_every_s=0)
    job = run(store, cluster, ticker, stop_when=["diverged"])
    found = NonFinite(step=2, place=NonFinitePlace.PARAMETER, tensor="layers.0.weight")
    cluster.report(f"{job.id}-1", step(1), found, step(2, loss=math.nan), rank=1)
    ticker.tick()
    assert store.get(job.id).state is JobState.RUNNING  # the other rank has yet to tell the step
    cluster.report(f"{job.id}-1", step(1), step(2, loss=2.0))
    ticker.tick()
    assert seen(store, job) == (JobState.FAILED, Reason.DIVERGED)
    assert cluster.stopped == [f"{job.id}-1"]
    assert "nan at step 2" in store.get(job.id).detail
    assert "in the parameter layers.0.weight, on rank 1" in store.get(job.id).detail


def test_a_run_that_ended_between_two_looks_is_judged_all_the_same(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    ticker = scheduler(store, cluster, tmp_path, rules_every_s=3600)
    job = run(store, cluster, ticker, stop_when=["diverged"])
    ticker.tick()  # looks for the first time
    for rank in (0, 1):
        cluster.report(f"{job.id}-1", step(1, loss=math.nan), rank=rank)
    ticker.tick()
    assert store.get(job.id).state is JobState.RUNNING
    cluster.report(f"{job.id}-1", SUCCEEDED)
    ticker.tick()
    assert seen(store, job) == (JobState.FAILED, Reason.DIVERGED)


def test_a_drift_limit_pauses_a_job_and_a_resume_waits_for_a_new_sample(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    ticker = scheduler(store, cluster, tmp_path, rules_every_s=0)
    job = run(store, cluster, ticker, drift_limits=[{"above": 0.2, "action": "pause"}])
    cluster.report(f"{job.id}-1", exceeded(30, "bn.1"))
    ticker.tick()
    assert seen(store, job) == (JobState.PAUSING, Reason.DRIFT_LIMIT)
    leave(store, cluster, job, AttemptEnded(outcome=Outcome.STOPPED, checkpoint_step=31))
    ticker.tick()
    paused = store.get(job.id)
    assert (paused.state, paused.reason) == (JobState.PAUSED, Reason.DRIFT_LIMIT)
    assert paused.detail == "Layer bn.1: rms_mean_shift 0.25 is above its limit of 0.2 at step 30. Saved at step 31"
    store.resume(paused)
    ticker.tick()
    for rank in (0, 1):
        cluster.report(f"{job.id}-2", started(resumed_step=31), rank=rank)
    ticker.tick()
    ticker.tick()
    assert seen(store, job) == (JobState.RUNNING, None)
    cluster.report(f"{job.id}-2", exceeded(60, "bn.1"))
    ticker.tick()
    assert seen(store, job) == (JobState.PAUSING, Reason.DRIFT_LIMIT)


def test_a_scheduler_that_takes_over_reads_a_long_run_in_pieces(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    job = run(store, cluster, scheduler(store, cluster, tmp_path), stop_when=["diverged"])
    told = np.zeros(2 * 120_000, STEP)
    told["rank"], told["step"] = np.repeat([0, 1], 120_000), np.tile(np.arange(1, 120_001), 2)
    told["loss"] = 1.0
    told["loss"][119_999] = math.inf
    store.record_steps(job.id, 1, told)
    for rank in (0, 1):  # how far it has come is told by the ranks
        cluster.report(f"{job.id}-1", step(120_000, loss=math.inf), rank=rank)
    watch = RuleWatch(store, every_s=3600)
    looks = [watch.look([job])[job.id] for _ in range(3)]
    assert looks[:2] == [Look(behind=True)] * 2
    assert looks[2].ruling is not None
    assert "inf at step 120000" in looks[2].ruling.detail
    assert watch.look([job]) == {}  # not yet again
    assert watch.look([job], finished=[job.id]) == {job.id: looks[2]}
    watch.forget_all_but()
    assert watch.look([job])[job.id].behind  # from the beginning


def test_of_many_jobs_the_longest_unseen_are_looked_at_and_the_finished_before_them(
    store: JobStore, tmp_path: Path
) -> None:
    cluster = Cluster(store, num_cpus=80)
    ticker = scheduler(store, cluster, tmp_path)
    jobs = [run(store, cluster, ticker, stop_when=["diverged"]) for _ in range(40)]
    watch = RuleWatch(store, every_s=0)
    order = list(watch.look(jobs, finished=[jobs[-1].id]))
    assert order[0] == jobs[-1].id
    while len(order) < len(jobs):
        looks = watch.look(jobs)
        assert set(looks.values()) == {Look()}
        order += looks
    assert set(order[: len(jobs)]) == {job.id for job in jobs}


def test_jobs_without_rules_are_not_looked_at(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    job = run(store, cluster, scheduler(store, cluster, tmp_path), target={"value": 0.9})
    store.close()
    assert RuleWatch(store).look([job]) == {}
