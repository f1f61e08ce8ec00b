"""The whole service, killed at random moments for as long as one likes: ``make soak``.

A real service process serves submitters and runners, is killed with SIGKILL, started again, and killed again, also
while it starts. After each round of kills it may bring its jobs to their ends; then its database is compared with
what was asked for and told. The tally is kept in a file, and a soak that was interrupted goes on after its last
whole round. Exits with 1 if anything was ever wrong.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from service.client import Client
from service.errors import Conflict, ServiceError
from service.jobs import Job, JobSpec, JobState
from service.log import configure_log
from service.store import JobStore
from tests.faults.aftermath import crashes, what_went_wrong
from tests.faults.databases import Databases, Files, OnServer
from tests.faults.history import all_events, problems_of
from tests.faults.stand_in_ray import StandInRay, loss_of, standing_in
from tests.postgresql import PostgresServer

KILLS_A_ROUND = 20
NUM_STEPS = 60
NUM_SUBMITTERS = 2

_PATIENCE_S = 300.0

_Answer = TypeVar("_Answer")


@dataclass
class Tally:
    """What has happened so far, over all rounds; ``wrong`` must stay empty."""

    crash_points: int = 0
    """Instructions between which the store and the scheduler were killed; all of them, once, on each database."""
    rounds: int = 0
    kills: int = 0
    kills_while_starting: int = 0
    jobs: int = 0
    attempts: int = 0
    events: int = 0
    points: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Tally":
        return cls(**json.loads(path.read_text())) if path.exists() else cls()

    def write(self, path: Path) -> None:
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        temporary.rename(path)


class Submitter(threading.Thread):
    """Submits jobs and steers some of them; asks again until it is answered, as its users would."""

    def __init__(self, url: str, name: str, chance: random.Random) -> None:
        super().__init__(name=name)
        self.jobs: dict[str, bool] = {}
        """By id, whether its cancellation was asked for."""
        self.wrong: list[str] = []
        self._url = url
        self._chance = chance
        self._enough = threading.Event()

    def run(self) -> None:
        number = 0
        with Client(self._url) as client:
            while not self._enough.wait(self._chance.uniform(0.1, 0.8)):
                number += 1
                try:
                    self._live_with_one(client, f"{self.name}-{number}")
                except Exception as error:  # a soak tells of everything, and goes on
                    self.wrong.append(f"{self.name}: {type(error).__name__}: {error}")

    def finish(self) -> None:
        """Let the job at hand be the last; a service must be there."""
        self._enough.set()
        self.join(_PATIENCE_S)

    def _live_with_one(self, client: Client, key: str) -> None:
        spec = JobSpec(name=key, max_steps=NUM_STEPS, num_workers=self._chance.choice((1, 2)))
        job = _insist(lambda: client.submit(spec, key))
        self.jobs[job.id] = False
        if self._chance.random() < 0.3 and _insist(lambda: client.submit(spec, key)).id != job.id:
            self.wrong.append(f"{job.id}: its key made another job")
        fate = self._chance.random()
        self._enough.wait(self._chance.uniform(0.0, 1.0))
        try:
            if fate < 0.2:
                self.jobs[job.id] = True
                _insist(lambda: client.cancel(job.id))
            elif fate < 0.4:
                _insist(lambda: client.pause(job.id))
                _insist(lambda: self._resumed(client, job.id))
        except Conflict:
            return  # it is over, or recovering: the verb came too late or too early, and the service said so

    def _resumed(self, client: Client, job_id: str) -> Job | None:
        """None while it is still about to be paused."""
        job = client.job(job_id)
        return None if job.state is JobState.PAUSING else client.resume(job_id) if not job.state.terminal else job


def _insist(ask: Callable[[], _Answer | None]) -> _Answer:
    """The first answer; what may succeed later is asked again."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            if (answer := ask()) is not None:
                return answer
        except ServiceError as error:
            if not error.retryable:
                raise
        if time.monotonic() > deadline:
            raise TimeoutError(f"no answer within {_PATIENCE_S:g} s")
        time.sleep(0.05)


class KilledService:
    """`syncbn serve` on one folder, port and cluster, started and killed in turns."""

    def __init__(self, folder: Path, ray_address: str) -> None:
        self._folder = folder
        self._port = _free_port()
        self._ray_address = ray_address
        self.url = f"http://127.0.0.1:{self._port}"

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "service", "serve", "--json"]
        command += ["--data-dir", str(self._folder), "--port", str(self._port)]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SYNCBN_")}
        with (self._folder / "service.log").open("a") as log:
            return subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=inherited | {"SYNCBN_RAY_ADDRESS": self._ray_address},
            )


def soak_round(tally: Tally, folder: Path, chance: random.Random) -> None:
    """Kill a fresh service so many times, let it end its jobs, and add what was found to the tally."""
    with standing_in(folder / "spool", random.Random(chance.random())) as (ray, ray_address):
        service = KilledService(folder, ray_address)
        submitters = [
            Submitter(service.url, f"submitter-{number}", random.Random(chance.random()))
            for number in range(NUM_SUBMITTERS)
        ]
        for submitter in submitters:
            submitter.start()
        while_starting = sum(_kill_once(service, chance) for _ in range(KILLS_A_ROUND))
        process = service.start()
        try:
            for submitter in submitters:
                submitter.finish()
            jobs = {job_id: asked for submitter in submitters for job_id, asked in submitter.jobs.items()}
            _wait_for_ends(service.url, list(jobs))
            wrong = [what for submitter in submitters for what in submitter.wrong]
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
            assert process.stdout is not None
            process.stdout.close()
    tally.rounds += 1
    tally.kills += KILLS_A_ROUND
    tally.kills_while_starting += while_starting
    tally.wrong += wrong
    _judge(tally, folder, jobs, ray)


def _kill_once(service: KilledService, chance: random.Random) -> bool:
    """Start the service and kill it; whether that was before it had said that it listens."""
    starting = chance.random() < 0.3
    with service.start() as process:
        assert process.stdout is not None
        listening = threading.Thread(target=process.stdout.readline)
        listening.start()
        # How long one waits before a kill is what is random here; nothing is waited for.
        if starting:
            time.sleep(chance.uniform(0.5, 3.0))
        else:
            listening.join(_PATIENCE_S)
            time.sleep(chance.uniform(0.0, 2.5))
        was_starting = listening.is_alive()
        process.kill()
        listening.join(10)
    return was_starting


def _wait_for_ends(url: str, job_ids: list[str]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    with Client(url) as client:
        for job_id in job_ids:
            while not _insist(partial(client.job, job_id)).state.terminal and time.monotonic() < deadline:
                time.sleep(0.2)


def _judge(tally: Tally, folder: Path, asked: dict[str, bool], ray: StandInRay) -> None:
    """Compare what the service has stored with what was asked of it and what its runners have told."""
    store = JobStore.open(folder / "syncbn.sqlite")
    try:
        tally.wrong += ray.beside_others
        stored = set(_all_ids(store))
        tally.wrong += [f"{job_id} was answered and is not there" for job_id in asked.keys() - stored]
        tally.wrong += [f"{job_id} is there and was never answered" for job_id in stored - asked.keys()]
        for job_id in stored & asked.keys():
            job = store.get(job_id)
            tally.jobs += 1
            tally.attempts += job.attempt
            tally.events += len(all_events(store, job_id))
            tally.ends[job.state] = tally.ends.get(job.state, 0) + 1
            tally.wrong += problems_of(store, job_id)
            ends = {JobState.SUCCEEDED, JobState.CANCELLED} if asked[job_id] else {JobState.SUCCEEDED}
            if job.state not in ends:
                tally.wrong.append(f"{job_id} is {job.state}, {job.reason}: {job.detail}")
            _judge_points(tally, store, job)
    finally:
        store.close()


def _judge_points(tally: Tally, store: JobStore, job: Job) -> None:
    if job.progress is None:
        return
    names = store.metric_names(job.id)
    for rank in range(job.spec.num_workers if names else 0):
        series = store.metric(job.id, "train/loss", rank=rank, max_points=None)
        tally.points += len(series.steps)
        count = NUM_STEPS if job.state is JobState.SUCCEEDED else len(series.steps)
        if list(series.steps) != list(range(1, count + 1)):
            tally.wrong.append(f"{job.id}: rank {rank} has the steps {series.steps}")
        if list(series.values) != [loss_of(rank, number) for number in series.steps]:
            tally.wrong.append(f"{job.id}: rank {rank} has other losses than it told")


def _all_ids(store: JobStore) -> list[str]:
    ids: list[str] = []
    cursor = None
    while True:
        page = store.list_jobs(limit=100, cursor=cursor)
        ids += [job.id for job in page.items]
        cursor = page.next_cursor
        if cursor is None:
            return ids


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def crash_everywhere(tally: Tally, folder: Path) -> None:
    """Kill the store and the scheduler before each instruction of a story, and let another go on from there."""
    server = PostgresServer()
    try:
        server.start()
        url = server.url().get_secret_value()
        _crash_on(tally, folder / "sqlite", Files())
        _crash_on(tally, folder / "postgresql", OnServer(url), url)
    finally:
        server.remove()


def _crash_on(tally: Tally, folder: Path, databases: Databases, *url: str) -> None:
    folder.mkdir()
    for where, killed_before in crashes(folder, 1, *url):
        tally.crash_points += 1
        wrong = what_went_wrong(where, databases)
        tally.wrong += [f"killed before {killed_before} in {folder.name}/{where.name}: {what}" for what in wrong]


def main() -> int:
    """Soak until the tally has as many kills as wanted."""
    configure_log(as_json=True)
    wanted, path = int(sys.argv[1]), Path(sys.argv[2])
    path.parent.mkdir(parents=True, exist_ok=True)
    tally = Tally.read(path)
    if not tally.crash_points:
        with tempfile.TemporaryDirectory(prefix="syncbn-soak-") as folder:
            crash_everywhere(tally, Path(folder))
        tally.write(path)
    while tally.kills < wanted and not tally.wrong:
        with tempfile.TemporaryDirectory(prefix="syncbn-soak-") as folder:
            soak_round(tally, Path(folder), random.Random(tally.rounds))  # the round's number is its seed
        tally.write(path)
        sys.stdout.write(json.dumps(asdict(tally)) + "\n")
        sys.stdout.flush()
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
