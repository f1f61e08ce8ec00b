"""What a lost attempt had measured and saved, and not told: the next one measures it again."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from service.jobs import AttemptEnded, JobSpec, Outcome, Reason
from service.scheduler import LaunchState, Scheduler
from service.store import JobStore
from service.training.checkpoint import Checkpoint, latest_checkpoint, write_checkpoint
from tests.service.scheduler.test_scheduler import Cluster, run, scheduler
from tests.service.store.telling import started, step


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore.open(tmp_path / "jobs.sqlite")
    yield store
    store.close()


def test_a_new_attempt_is_told_how_far_every_rank_had_told(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    ticker = scheduler(store, cluster, tmp_path)
    job = run(store, cluster, ticker)
    cluster.report(f"{job.id}-1", *(step(number) for number in range(1, 8)), rank=0)
    cluster.report(f"{job.id}-1", *(step(number) for number in range(1, 6)), rank=1)
    lost = AttemptEnded(outcome=Outcome.FAILED, reason=Reason.WORKER_LOST, detail="rank 1 died")
    cluster.report(f"{job.id}-1", lost)
    for _ in range(3):
        ticker.tick()
    cluster.finish(f"{job.id}-2", LaunchState.FAILED)  # before any of its ranks began
    for _ in range(2):
        ticker.tick()
    assert [(request.attempt, request.told_step) for request in cluster.launched] == [(1, None), (2, 5), (3, 5)]


def look_until_launched(ticker: Scheduler, cluster: Cluster, number: int) -> None:
    for _ in range(10):
        if len(cluster.launched) == number:
            return
        ticker.tick()
    raise AssertionError(f"attempt {number} was not launched")


def test_an_attempt_of_which_only_one_rank_began_has_told_nothing(store: JobStore, tmp_path: Path) -> None:
    cluster = Cluster(store)
    ticker = scheduler(store, cluster, tmp_path)
    job = store.create(JobSpec(name="t", epochs=1, num_workers=2))[0]
    lost = AttemptEnded(outcome=Outcome.FAILED, reason=Reason.WORKER_LOST, detail="rank 1 died")
    for number, begin in enumerate(([0], [0, 1], [1]), start=1):
        look_until_launched(ticker, cluster, number)
        for rank in begin:
            cluster.report(f"{job.id}-{number}", started(resumed_step=10 * number), rank=rank)
        cluster.report(f"{job.id}-{number}", lost, rank=-1)
    look_until_launched(ticker, cluster, 4)
    # The rank that had not begun had still to tell what lies before.
    assert [request.told_step for request in cluster.launched] == [None, 0, 20, 20]


@pytest.mark.parametrize(("told_step", "chosen"), [(None, 6), (6, 6), (9, 6), (5, 4), (4, 4), (3, 6), (0, 6)])
def test_a_checkpoint_beyond_what_was_told_counts_where_there_is_no_other(
    tmp_path: Path, told_step: int | None, chosen: int
) -> None:
    for number in (4, 6):
        write_checkpoint(tmp_path, Checkpoint(number, "f", {}, {}, torch.zeros(1, 1, dtype=torch.uint8)))
    found = latest_checkpoint(tmp_path, told_step).checkpoint
    assert found is not None
    assert found.step == chosen
