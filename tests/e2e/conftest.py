"""A real service in a process of its own, started as a user starts it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from service.client import Client
from service.cluster.head_record import read_record
from service.errors import ServiceError
from service.jobs import Job, JobSpec, Mlp

T = TypeVar("T")


def wait_for(what: str, look: Callable[[], T | None], timeout_s: float = 60.0) -> T:
    """The first answer of ``look`` that is not None or False; fails by name when none comes in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if answer := look():
            return answer
        time.sleep(0.05)
    raise AssertionError(f"waited {timeout_s:g} s in vain for {what}")


class RunningService:
    """`syncbn serve` on a data folder; it can be killed and started again on the same one."""

    def __init__(self, data_dir: Path, environment: dict[str, str] | None = None) -> None:
        self.data_dir = data_dir
        self._environment = environment or {}
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, port: int = 0) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SYNCBN_", "RAY_"))}
        command = [sys.executable, "-m", "service", "serve", "--json"]
        command += ["--data-dir", str(self.data_dir), "--port", str(port)]
        self.data_dir.mkdir(exist_ok=True)
        with (self.data_dir / "service.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=inherited | self._environment
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._end(signal.SIGKILL)
            raise AssertionError((self.data_dir / "service.log").read_text())
        self.url = json.loads(line)["url"]

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        with self.client() as client:
            wait_for("the service to be ready", lambda: set(client.ready().values()) == {"ok"}, timeout_s)

    def client(self) -> Client:
        return Client(self.url)

    def kill(self) -> None:
        """End the service as a power cut would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End the service as Ctrl-C does."""
        self._end(signal.SIGINT)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)
        self._process.wait(60)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process = None

    def head_processes(self) -> list[psutil.Process]:
        """Everything that the local Ray head has started and that still runs."""
        record = read_record(self.data_dir / "ray" / "head.json")
        return record.processes() if record else []


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    running = RunningService(tmp_path_factory.mktemp("service"))
    try:
        running.start()
        running.wait_ready()
        yield running
        processes = running.head_processes()
        assert processes
    finally:
        running.stop()
    _gone, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive, "the service left processes of its Ray head behind"


@pytest.fixture
def client(service: RunningService) -> Iterator[Client]:
    with service.client() as client:
        yield client


def small_spec(name: str, max_steps: int, **fields: object) -> JobSpec:
    """A digits job of two workers whose length is its number of steps."""
    return JobSpec.model_validate(
        {
            "name": name,
            "model": Mlp(hidden_sizes=(16,)),
            "num_workers": 2,
            "batch_size_per_worker": 8,
            "max_steps": max_steps,
            **fields,
        }
    )


def wait_until_ended(client: Client, job_id: str, timeout_s: float = 90.0) -> Job:
    """The job once it is terminal."""

    def ended() -> Job | None:
        try:
            job = client.job(job_id)
        except ServiceError:
            return None  # the service is just being restarted
        return job if job.state.terminal else None

    return wait_for(f"{job_id} to end", ended, timeout_s)
