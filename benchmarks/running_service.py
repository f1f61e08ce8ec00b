"""A service in a process of its own for benchmarks."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from service.client import Client


@dataclass(frozen=True)
class Served:
    """A service that listens."""

    url: str
    pid: int


@contextmanager
def serving(folder: Path, variables: Mapping[str, str]) -> Iterator[Served]:
    """A service on the data ``folder``; ``variables`` are set in its environment."""
    command = [sys.executable, "-m", "service", "serve", "--json", "--data-dir", str(folder), "--port", "0"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SYNCBN_")}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**inherited, **variables}
    ) as process:
        try:
            assert process.stdout is not None
            yield Served(json.loads(process.stdout.readline())["url"], process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


@contextmanager
def running_service(**variables: str) -> Iterator[Client]:
    """A client of a fresh service on a folder of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="syncbn-bench-") as folder,
        serving(Path(folder), variables) as served,
        Client(served.url) as client,
    ):
        yield client


def wait_until_ready(client: Client, timeout_s: float = 60.0) -> None:
    """Return once every part of the service, its local Ray head too, says ok."""
    deadline = time.monotonic() + timeout_s
    while set(client.ready().values()) != {"ok"}:
        if time.monotonic() > deadline:
            raise TimeoutError(f"not ready within {timeout_s:g} s: {client.ready()}")
        time.sleep(0.05)


def wait_until_ended(client: Client, job_id: str, timeout_s: float = 300.0) -> None:
    """Return once the job is terminal."""
    deadline = time.monotonic() + timeout_s
    while not client.job(job_id).state.terminal:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{job_id} did not end within {timeout_s:g} s")
        time.sleep(0.2)
