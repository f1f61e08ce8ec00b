"""Real outages around a job that reports over real HTTP: of its database, of its disk, of the way to the service."""

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import pytest

from service.cluster.ingest_sender import UNDELIVERED, IngestSender
from service.cluster.outbox import Record
from service.errors import StoreUnavailable
from service.jobs import AttemptEnded, Control, JobSpec, JobState, LaunchRequest, Outcome, Reason
from service.scheduler import Scheduler, ScriptedLauncher
from service.store import JobStore
from tests.faults.history import all_events, problems_of
from tests.postgresql import PostgresServer
from tests.service.api.house import House
from tests.service.api.live import listening
from tests.service.cluster.waiting import wait_until
from tests.service.store.telling import TIME, started, step

NUM_STEPS = 600
SUCCEEDED = AttemptEnded(outcome=Outcome.SUCCEEDED)
PATIENCE_S = 100.0


class Place(Protocol):
    """Where a store lives, and what can befall it."""

    store: JobStore

    def fail(self) -> None: ...

    def recover(self) -> None: ...


@dataclass
class RestartedServer:
    server: PostgresServer
    store: JobStore

    def fail(self) -> None:
        self.server.stop()

    def recover(self) -> None:
        self.server.start()


@dataclass
class FullDisk:
    ballast: Path
    store: JobStore

    def fail(self) -> None:
        with self.ballast.open("ab", buffering=0) as file:
            for size in (65536, 4096, 1):
                try:
                    while file.write(b"x" * size):
                        pass
                except OSError:
                    continue

    def recover(self) -> None:
        self.ballast.unlink()


@contextmanager
def restarted_server(tmp_path: Path) -> Iterator[Place]:
    server = PostgresServer()
    try:
        server.start()
        store = JobStore.connect(server.url(server.new_database()), busy_timeout_s=1.0)
        try:
            yield RestartedServer(server, store)
        finally:
            store.close()
    finally:
        server.remove()


@contextmanager
def full_disk(tmp_path: Path) -> Iterator[Place]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small file system, and not in every container")
    try:
        store = JobStore.open(folder / "jobs.sqlite")
        try:
            yield FullDisk(folder / "ballast", store)
        finally:
            store.close()
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=60)


@contextmanager
def scheduling(store: JobStore, launcher: ScriptedLauncher, url: str, storage: Path) -> Iterator[None]:
    scheduler = Scheduler(
        store, launcher, ingest_url=url, storage=storage, tick_s=0.02, observe_every_s=0.1, capacity_every_s=0.1
    )
    stopping = threading.Event()
    thread = threading.Thread(target=scheduler.run, args=(stopping,))
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(30)
        assert not thread.is_alive()


class Runner:
    """Reports for all ranks of an attempt as the real one does, with losses of its own."""

    def __init__(self, url: str, request: LaunchRequest, token: str, spool: Path) -> None:
        self.sender = IngestSender(url, request.attempt_id, token, spool / request.attempt_id)
        self._request = request
        self.sender.start()
        for rank in range(request.spec.num_workers):
            self._put(rank, [started(total_steps=NUM_STEPS).model_dump_json()])

    def train(self, first: int, last: int) -> None:
        for rank in range(self._request.spec.num_workers):
            steps = [step(n, loss=self.loss(rank, n)).model_dump_json() for n in range(first, last + 1)]
            self._put(rank, steps)

    def loss(self, rank: int, number: int) -> float:
        return self._request.attempt + rank / 4 + number / 1024

    def series(self, rank: int) -> tuple[list[int], list[float]]:
        """What the service must have of a rank that has taken every step."""
        numbers = list(range(1, NUM_STEPS + 1))
        return numbers, [self.loss(rank, number) for number in numbers]

    def _put(self, rank: int, events: list[str]) -> None:
        self.sender.put(rank, [Record(TIME, event) for event in events])


class Launches:
    """Makes a runner of each attempt that is launched."""

    def __init__(self, spool: Path) -> None:
        self.url = ""
        self.runners: list[Runner] = []
        self._spool = spool
        self.cluster = ScriptedLauncher(on_launch=self._launch)

    def _launch(self, request: LaunchRequest, token: str) -> None:
        self.runners.append(Runner(self.url, request, token, self._spool))

    def runner(self, number: int) -> Runner:
        wait_until(lambda: len(self.runners) >= number, PATIENCE_S, f"attempt {number}")
        return self.runners[number - 1]

    def end(self) -> None:
        for runner in self.runners:
            runner.sender.hurry(0.0)
            runner.sender.close(SUCCEEDED, 0.0)


@pytest.fixture
def launches(tmp_path: Path) -> Iterator[Launches]:
    launches = Launches(tmp_path / "spool")
    yield launches
    launches.end()


def stored_series(store: JobStore, job_id: str, rank: int) -> tuple[list[int], list[float]]:
    series = store.metric(job_id, "train/loss", rank=rank, max_points=None)
    return list(series.steps), list(series.values)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("place_of", [restarted_server, full_disk], ids=lambda each: each.__name__)
def test_what_is_told_while_nothing_can_be_stored_is_stored_afterwards(
    place_of: Callable[[Path], AbstractContextManager[Place]], launches: Launches, tmp_path: Path
) -> None:
    with (
        place_of(tmp_path) as place,
        listening(House(place.store).app()) as url,
        scheduling(place.store, launches.cluster, url, tmp_path),
    ):
        launches.url, store = url, place.store
        job, _ = store.create(JobSpec(name="patient", max_steps=NUM_STEPS, num_workers=2))
        runner = launches.runner(1)
        runner.train(1, 100)
        wait_until(lambda: store.get(job.id).state is JobState.RUNNING, PATIENCE_S, "the job to run")
        place.fail()
        runner.train(101, 500)
        with pytest.raises(StoreUnavailable):
            store.create(JobSpec(name="refused", epochs=1), "key")
        place.recover()
        wait_until(lambda: answers(store), PATIENCE_S, "the store to answer")
        again = store.create(JobSpec(name="refused", epochs=1), "key")[0].id
        runner.train(501, NUM_STEPS)
        assert runner.sender.close(SUCCEEDED, PATIENCE_S)
        wait_until(lambda: store.get(job.id).state is JobState.SUCCEEDED, PATIENCE_S, "the job's success")
        for rank in (0, 1):
            assert stored_series(store, job.id, rank) == runner.series(rank)
        assert store.get(job.id).attempt == 1
        assert [*problems_of(store, job.id), *problems_of(store, again)] == []
        assert len([event for event in all_events(store, job.id) if event.type == "rank_started"]) == 2
        assert {each.id for each in store.list_jobs().items} == {job.id, again}  # the refused one was not half made


def answers(store: JobStore) -> bool:
    try:
        store.create(JobSpec(name="refused", epochs=1), "key")
    except StoreUnavailable:
        return False
    return True


def test_a_runner_cut_off_for_longer_than_its_heartbeat_is_replaced_and_not_believed_again(
    launches: Launches, tmp_path: Path
) -> None:
    store = JobStore.open(tmp_path / "jobs.sqlite")
    with listening(House(store).app()) as url:
        launches.url = url
        port = urlsplit(url).port
        assert port is not None
        spec = JobSpec(name="cut off", max_steps=NUM_STEPS, num_workers=2, timeouts={"heartbeat_s": 3})
        job, _ = store.create(spec)
        with scheduling(store, launches.cluster, url, tmp_path):
            cut_off = launches.runner(1)
            cut_off.train(1, 100)
            wait_until(lambda: store.get(job.id).state is JobState.RUNNING, PATIENCE_S, "the job to run")
    with scheduling(store, launches.cluster, url, tmp_path):
        cut_off.train(101, 200)
        second = launches.runner(2)
    recoveries = [e for e in all_events(store, job.id) if e.type == "state_changed" and e.body["to"] == "recovering"]
    assert [event.body["reason"] for event in recoveries] == [Reason.NO_HEARTBEAT]
    with listening(House(store).app(), port), scheduling(store, launches.cluster, url, tmp_path):
        wait_until(lambda: cut_off.sender.control is Control.ABORT, PATIENCE_S, "the old runner to be turned away")
        assert not cut_off.sender.close(SUCCEEDED, PATIENCE_S)
        second.train(1, NUM_STEPS)
        assert second.sender.close(SUCCEEDED, PATIENCE_S)
        wait_until(lambda: store.get(job.id).state is JobState.SUCCEEDED, PATIENCE_S, "the job's success")
    assert (tmp_path / "spool" / f"{job.id}-1" / UNDELIVERED).exists()  # what nobody wanted to hear is not lost
    for rank in (0, 1):
        assert stored_series(store, job.id, rank) == second.series(rank)
    assert store.get(job.id).attempt == 2
    assert problems_of(store, job.id) == []
    store.close()
