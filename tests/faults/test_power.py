"""A power cut right after an answer: what was answered is there when the machine is started again."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import torch

from service.jobs import Control, IngestBatch, JobSpec, JobState
from service.store import JobStore
from service.training.checkpoint import Checkpoint, latest_checkpoint, write_checkpoint
from tests.faults.history import problems_of
from tests.faults.power import new_disk, write_unsynced
from tests.postgresql import PostgresServer
from tests.service.api.house import House
from tests.service.api.live import listening
from tests.service.store.telling import rank_batch, started, step

_JSON = {"Content-Type": "application/json"}


@contextmanager
def sqlite_on(folder: Path) -> Iterator[JobStore]:
    store = JobStore.open(folder / "jobs.sqlite")
    try:
        yield store
    finally:
        store.close()


@contextmanager
def postgresql_on(folder: Path) -> Iterator[JobStore]:
    """A server whose default is to answer before it has written, which the service must not leave so."""
    server = PostgresServer(folder / "data", fsync="on", synchronous_commit="off", wal_writer_delay="10s")
    try:
        server.start()
        store = JobStore.connect(server.url())
        try:
            yield store
        finally:
            store.close()
    finally:
        server.remove()


@dataclass(frozen=True)
class Kind:
    """A kind of database, and how large a disk it needs."""

    on: Callable[[Path], AbstractContextManager[JobStore]]
    size_mib: int


KINDS = {"sqlite": Kind(sqlite_on, 32), "postgresql": Kind(postgresql_on, 256)}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_what_was_answered_survives_a_power_cut(kind: Kind, tmp_path: Path) -> None:
    disk, found = new_disk(tmp_path / "disk", kind.size_mib), []
    with disk.mounted() as folder, kind.on(folder) as store, listening(House(store).app()) as url:
        os.sync()  # the tables are from before; what is answered from here on is not
        write_unsynced(folder / "unsynced")
        spec = JobSpec(name="night", max_steps=9, num_workers=1)
        answer = httpx2.post(f"{url}/v1/jobs", content=spec.model_dump_json(), headers=_JSON, timeout=30.0)
        found.append(disk.lose_power(tmp_path / "submitted"))
        assert answer.status_code == 201
        job_id = answer.json()["id"]
        job, token = store.start_attempt(store.get(job_id))
        store.transition(job, JobState.RUNNING)
        told = IngestBatch(batches=(rank_batch([started(), step(1, loss=0.5), step(2, loss=0.25)]),))
        reply = httpx2.post(
            f"{url}/v1/attempts/{job_id}-1/telemetry",
            content=told.model_dump_json(),
            headers=_JSON | {"Authorization": f"Bearer {token}"},
            timeout=30.0,
        )
        found.append(disk.lose_power(tmp_path / "told"))
        assert (reply.status_code, reply.json()["next_seq"]) == (200, {"0": 3})
        cancelled = httpx2.post(f"{url}/v1/jobs/{job_id}:cancel", timeout=30.0)
        found.append(disk.lose_power(tmp_path / "cancelled"))
        assert cancelled.status_code == 202
    states, points = [], []
    for after in found:
        with after.mounted() as folder:
            left = folder / "unsynced"
            assert not left.exists() or not left.read_bytes()  # so the copy has no more than a disk would have
            with kind.on(folder) as store:
                states.append(store.get(job_id).state)
                points.append(store.metric(job_id, "train/loss", rank=0).values)
                assert problems_of(store, job_id) == []
                if states[-1] is JobState.CANCELLING:
                    assert store.ingest(f"{job_id}-1", token, IngestBatch(batches=())).control is Control.ABORT
    assert states == [JobState.QUEUED, JobState.RUNNING, JobState.CANCELLING]
    assert points == [(), (0.5, 0.25), (0.5, 0.25)]


def test_a_checkpoint_that_was_written_survives_a_power_cut(tmp_path: Path) -> None:
    disk, found = new_disk(tmp_path / "disk", 32), []
    with disk.mounted() as folder:
        for number in (3, 6, 9):
            weights = {"weight": torch.full((1000,), float(number))}
            write_checkpoint(folder / "job", Checkpoint(number, "f", weights, {}, torch.zeros(1, 1, dtype=torch.uint8)))
            found.append(disk.lose_power(tmp_path / str(number)))
    for number, after in zip((3, 6, 9), found, strict=True):
        with after.mounted() as folder:
            latest = latest_checkpoint(folder / "job")
            assert latest.problems == ()
            assert latest.checkpoint is not None
            assert latest.checkpoint.step == number
            assert torch.equal(latest.checkpoint.model["weight"], torch.full((1000,), float(number)))
