"""What a lost attempt had measured and saved, and not told: the next one measures it again."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from service.jobs import AttemptEnded, Outcome, Reason
from service.scheduler import LaunchState
from service.store import JobStore
from service.training.checkpoint import Checkpoint, latest_checkpoint, write_checkpoint
from tests.service.scheduler.test_scheduler import Cluster, run, scheduler
from tests.service.store.telling import step


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


@pytest.mark.parametrize(("told_step", "chosen"), [(None, 6), (6, 6), (9, 6), (5, 4), (4, 4), (3, 6), (0, 6)])
def test_a_checkpoint_beyond_what_was_told_counts_where_there_is_no_other(
    tmp_path: Path, told_step: int | None, chosen: int
) -> None:
    for number in (4, 6):
        write_checkpoint(tmp_path, Checkpoint(number, "f", {}, {}, torch.zeros(1, 1, dtype=torch.uint8)))
    found = latest_checkpoint(tmp_path, told_step).checkpoint
    assert found is not None
    assert found.step == chosen
