"""Networks that part and come together again, under services that go on at both ends."""

import json
import os
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from service.client import Client
from service.jobs import Job, JobSpec, JobState
from service.store import JobStore
from tests.faults.history import problems_of
from tests.faults.machines import Switch, machine, switches
from tests.faults.stand_in_ray import StandInRay, loss_of, standing_in
from tests.postgresql import PostgresServer
from tests.service.cluster.waiting import wait_until

PATIENCE_S = 120.0
TOKEN = "a-token-that-nobody-else-knows-0123456789"


@contextmanager
def service(number: int, cables: list[Switch], folder: Path, **settings: str) -> Iterator[Client]:
    """A real service on a machine of its own, as its users reach it over the last of its cables."""
    folder.mkdir(exist_ok=True)
    address = cables[-1].address_of(number)
    chosen = {"DATA_DIR": str(folder), "HOST": "0.0.0.0", "PORT": "8400", "PUBLIC_URL": f"http://{address}:8400"}
    chosen |= {"API_TOKEN": TOKEN, "TLS_TERMINATED": "true", **settings}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SYNCBN_")}
    environment = inherited | {f"SYNCBN_{name}": value for name, value in chosen.items()}
    command = [sys.executable, "-m", "service", "serve", "--json"]
    with machine(number, cables, command, environment, folder / "service.log") as said:
        line = said.readline()
        assert line, (folder / "service.log").read_text()
        assert "url" in json.loads(line)
        with Client(f"http://{address}:8400", token=TOKEN) as client:
            yield client


def submit(client: Client, name: str, num_steps: int) -> Job:
    return client.submit(JobSpec(name=name, max_steps=num_steps, num_workers=2))


def has_come_to(store: JobStore, job_id: str, step: int) -> bool:
    progress = store.get(job_id).progress
    return progress is not None and progress.step >= step


def silent_for_s(store: JobStore, job_id: str) -> float:
    heard_at = store.get(job_id).heartbeat_at
    return 0.0 if heard_at is None else (datetime.now(UTC) - heard_at).total_seconds()


def check(store: JobStore, ray: StandInRay, *job_ids: str) -> None:
    """Each job ran once, and all that its ranks told is there once."""
    for job_id in job_ids:
        job = store.get(job_id)
        assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1), job.detail
        assert problems_of(store, job_id) == []
        for rank in (0, 1):
            series = store.metric(job_id, "train/loss", rank=rank, max_points=None)
            assert series.steps == tuple(range(1, (job.spec.max_steps or 0) + 1))
            assert series.values == tuple(loss_of(rank, number) for number in series.steps)
    assert sorted(ray.launched) == sorted(f"{job_id}-1" for job_id in job_ids)
    assert ray.beside_others == []


@pytest.mark.timeout(400)
def test_a_job_outlives_a_split_between_service_and_cluster(tmp_path: Path) -> None:
    with ExitStack() as stack:
        (network,) = stack.enter_context(switches(1))
        ray, ray_url = stack.enter_context(standing_in(tmp_path / "spool", random.Random(0), network.address, 0.0))
        client = stack.enter_context(service(2, [network], tmp_path / "service", RAY_ADDRESS=ray_url))
        store = JobStore.open(tmp_path / "service" / "syncbn.sqlite")
        stack.callback(store.close)
        job = submit(client, "split", 400)
        wait_until(lambda: has_come_to(store, job.id, 50), PATIENCE_S, "50 steps")
        network.pull(2)
        wait_until(lambda: silent_for_s(store, job.id) > 6, PATIENCE_S, "a silence of the job")
        reached = store.get(job.id).progress
        assert store.get(job.id).state is JobState.RUNNING
        assert reached is not None
        assert reached.step < 400
        network.plug(2)
        wait_until(lambda: store.get(job.id).state.terminal, PATIENCE_S, "the job's end")
        check(store, ray, job.id)


@pytest.mark.timeout(400)
def test_a_service_split_from_its_database_is_replaced_and_harms_nothing_when_it_comes_back(tmp_path: Path) -> None:
    with ExitStack() as stack:
        to_database, network = stack.enter_context(switches(2))
        server = PostgresServer(listen_addresses=to_database.address)
        stack.callback(server.remove)
        server.admit("198.18.0.0/15")
        server.start()
        url = f"postgresql://postgres@{to_database.address}/{server.new_database()}"
        ray, ray_url = stack.enter_context(standing_in(tmp_path / "spool", random.Random(0), network.address, 0.0))
        store = JobStore.connect(server.url("test_1"))
        stack.callback(store.close)
        settings = {"DATABASE_URL": url, "RAY_ADDRESS": ray_url, "STORAGE": str(tmp_path / "storage")}
        cables = [to_database, network]
        first = stack.enter_context(service(2, cables, tmp_path / "first", **settings))
        before = submit(first, "before", 400)
        wait_until(lambda: has_come_to(store, before.id, 20), PATIENCE_S, "20 steps")
        second = stack.enter_context(service(3, cables, tmp_path / "second", **settings))

        to_database.pull(2)  # and not from the cluster: it could still act there
        during = submit(second, "during", 40)
        wait_until(lambda: has_come_to(store, during.id, 20), PATIENCE_S, "another service to take over")
        ((holder_now, token),) = server.execute("SELECT holder, token FROM leases WHERE name = 'scheduler'", "test_1")
        to_database.plug(2)

        wait_until(lambda: all(store.get(job.id).state.terminal for job in (before, during)), PATIENCE_S, "both ends")
        wait_until(lambda: set(first.ready().values()) == {"ok"}, PATIENCE_S, "the first to be ready again")
        after = submit(first, "after", 40)
        wait_until(lambda: store.get(after.id).state.terminal, PATIENCE_S, "the end of a job from after")
        check(store, ray, before.id, during.id, after.id)
        assert server.execute("SELECT holder, token FROM leases WHERE name = 'scheduler'", "test_1") == [
            (holder_now, token)
        ]
        assert token == 2
