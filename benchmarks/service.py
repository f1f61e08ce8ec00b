"""What the service stands: submitters at once, a long history, many followers, much telemetry, a restart.

Each part starts a service of its own with a cluster that does not answer, so that jobs stay where they are put and
only the service is measured. Goals stand beside the figures; a figure that misses its goal is told like any other.
"""

import asyncio
import json
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpx2
import psutil

from benchmarks.record import record
from benchmarks.running_service import serving
from service.jobs import (
    IngestBatch,
    JobSpec,
    JobState,
    RankBatch,
    RankStarted,
    StepMetrics,
    TelemetryEvent,
    attempt_id,
)
from service.jobs.identifiers import new_job_id
from service.jobs.states import Phase
from service.store import JobStore

_NOWHERE = "http://127.0.0.1:9"
_JSON = {"Content-Type": "application/json"}


def submit_at_once(num_clients: int = 50, seconds: float = 15.0) -> dict[str, Any]:
    """Latency of submitting: by clients that never rest, and by as many that submit once a second each.

    The clients are bare connections, made before the clock starts: they share the machine with the service, and an
    HTTP client of Python would take as much of it.
    """

    async def main(address: SplitResult, pause_s: float) -> list[float]:
        connections = [await asyncio.open_connection(address.hostname, address.port) for _ in range(num_clients)]
        durations: list[float] = []
        end = time.monotonic() + seconds

        async def client(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(pause_s * number / num_clients)
            while time.monotonic() < end:
                began = time.perf_counter()
                body = JobSpec(name=f"client {number}", epochs=1).model_dump_json().encode()
                await _post(reader, writer, address, body)
                durations.append(1e3 * (time.perf_counter() - began))
                await asyncio.sleep(max(0.0, pause_s - (time.perf_counter() - began)) if pause_s else 0)
            writer.close()
            await writer.wait_closed()

        await asyncio.gather(*[client(number, *connection) for number, connection in enumerate(connections)])
        return durations

    told: dict[str, Any] = {"goal_p99_ms": 50}
    for name, pause_s in (("once_a_second_each", 1.0), ("without_rest", 0.0)):
        with tempfile.TemporaryDirectory(prefix="syncbn-bench-") as folder, serving(Path(folder), _away()) as served:
            process = psutil.Process(served.pid)
            cpu = sum(process.cpu_times()[:2])
            durations = asyncio.run(main(urlsplit(served.url), pause_s))
            cpu_ms = 1e3 * (sum(process.cpu_times()[:2]) - cpu) / len(durations)
            told[name] = _percentiles(durations) | {
                "requests_per_s": len(durations) / seconds,
                "service_cpu_ms_a_request": cpu_ms,
            }
    return told


def list_long_history(num_jobs: int = 100_000, num_requests: int = 300) -> dict[str, Any]:
    """Latency of pages of 50 of ``num_jobs`` jobs: the newest, one in the middle, by state."""
    with tempfile.TemporaryDirectory(prefix="syncbn-bench-") as folder:
        _make_history(Path(folder), num_jobs)
        with serving(Path(folder), _away()) as served, httpx2.Client(base_url=served.url, timeout=30) as http:
            cursor = http.get("/v1/jobs", params={"limit": 200}).json()["next_cursor"]
            for _ in range(50):
                cursor = http.get("/v1/jobs", params={"limit": 200, "cursor": cursor}).json()["next_cursor"]
            pages: Mapping[str, Mapping[str, str | int]] = {
                "newest": {"limit": 50},
                "in_the_middle": {"limit": 50, "cursor": cursor},
                "by_state": {"limit": 50, "state": "failed"},
            }
            told: dict[str, Any] = {"jobs": num_jobs, "goal_p99_ms": 30}
            for name, query in pages.items():
                durations = [_timed(http, "/v1/jobs", query) for _ in range(num_requests)]
                told[name] = _percentiles(durations)
            return told


def follow_at_once(num_readers: int = 500, num_jobs: int = 5, seconds: float = 20.0) -> dict[str, Any]:
    """How late ``num_readers`` followers are told of events, and what memory that takes."""

    async def main(url: str, jobs: Sequence[tuple[str, str]], process: psutil.Process) -> dict[str, Any]:
        delays: list[float] = []
        num_told = 0
        connected = asyncio.Event()
        num_connected = 0

        async def reader(http: httpx2.AsyncClient, job_id: str) -> None:
            nonlocal num_connected, num_told
            async with http.stream("GET", f"/v1/jobs/{job_id}/stream?after=3") as answer:
                num_connected += 1
                if num_connected == num_readers:
                    connected.set()
                async for line in answer.aiter_lines():
                    if line.startswith("data:") and '"type":"rank_started"' in line:
                        told = json.loads(line[5:])
                        delays.append(time.time() - told["body"]["steps_per_epoch"] / 1000)
                        num_told += 1

        async def teller() -> int:
            num_events = 0
            async with httpx2.AsyncClient(base_url=url, timeout=30) as http:
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    for job_id, token in jobs:
                        now = int(time.time() * 1000)
                        body = _telemetry([_started(now)], num_events // len(jobs))
                        path = f"/v1/attempts/{attempt_id(job_id, 1)}/telemetry"
                        headers = _JSON | {"Authorization": f"Bearer {token}"}
                        assert (await http.post(path, content=body, headers=headers)).status_code == 200
                        num_events += 1
                    await asyncio.sleep(1.0)
            return num_events

        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=url, timeout=None, limits=limits) as http:
            readers = [asyncio.create_task(reader(http, jobs[number % len(jobs)][0])) for number in range(num_readers)]
            await asyncio.wait_for(connected.wait(), 60)
            before, cpu = process.memory_info().rss, sum(process.cpu_times()[:2])
            num_events = await teller()
            await asyncio.sleep(2.0)
            used = sum(process.cpu_times()[:2]) - cpu
            after = process.memory_info().rss
            for task in readers:
                task.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
        expected = num_events * num_readers // len(jobs)
        return {
            "readers": num_readers,
            "events": num_events,
            "told": num_told,
            "expected": expected,
            "delay_s": {"median": statistics.median(delays), "max": max(delays)},
            "goal_max_delay_s": 1.0,
            "memory_mib": {"before": before / 2**20, "after": after / 2**20},
            "share_of_one_core": used / (seconds + 2.0),
        }

    with tempfile.TemporaryDirectory(prefix="syncbn-bench-") as folder:
        jobs = _running_jobs(Path(folder), num_jobs)
        with serving(Path(folder), _away()) as served:
            return asyncio.run(main(served.url, jobs, psutil.Process(served.pid)))


def take_in(num_jobs: int = 8, points_per_s: int = 5000, seconds: float = 20.0) -> dict[str, Any]:
    """The processor time that the service takes for telemetry of 8 jobs; a step is three points."""
    with tempfile.TemporaryDirectory(prefix="syncbn-bench-") as folder:
        jobs = _running_jobs(Path(folder), num_jobs)
        steps_a_post = round(points_per_s / 3 / num_jobs / 2)
        with serving(Path(folder), _away()) as served, httpx2.Client(base_url=served.url, timeout=30) as http:
            process = psutil.Process(served.pid)
            time.sleep(1.0)
            idle_from, idle_cpu = time.monotonic(), sum(process.cpu_times()[:2])
            time.sleep(4.0)
            idle = (sum(process.cpu_times()[:2]) - idle_cpu) / (time.monotonic() - idle_from)
            cpu, began, num_posts = sum(process.cpu_times()[:2]), time.monotonic(), 0
            while time.monotonic() - began < seconds:
                first = num_posts * steps_a_post
                for job_id, token in jobs:
                    body = _telemetry([_step(first + n + 1) for n in range(steps_a_post)], 1 + first)
                    path = f"/v1/attempts/{attempt_id(job_id, 1)}/telemetry"
                    headers = _JSON | {"Authorization": f"Bearer {token}"}
                    assert http.post(path, content=body, headers=headers).status_code == 200
                num_posts += 1
                time.sleep(max(0.0, began + num_posts * 0.5 - time.monotonic()))
            elapsed = time.monotonic() - began
            used = (sum(process.cpu_times()[:2]) - cpu) / elapsed
        return {
            "jobs": num_jobs,
            "points_per_s": 3 * steps_a_post * num_posts * num_jobs / elapsed,
            "share_of_one_core": used,
            "idle_share_of_one_core": idle,
            "goal_share_of_one_core": 0.30,
        }


def restart(num_jobs: int = 100) -> dict[str, Any]:
    """From the start of a service over ``num_jobs`` running jobs until it tells the state of every one."""
    with tempfile.TemporaryDirectory(prefix="syncbn-bench-") as folder:
        jobs = _running_jobs(Path(folder), num_jobs)
        began = time.monotonic()
        with serving(Path(folder), _away()) as served, httpx2.Client(base_url=served.url, timeout=30) as http:
            listening_s = time.monotonic() - began
            states = {http.get(f"/v1/jobs/{job_id}").json()["state"] for job_id, _ in jobs}
            return {
                "jobs": num_jobs,
                "listening_s": listening_s,
                "all_told_s": time.monotonic() - began,
                "states": sorted(states),
                "goal_s": 5.0,
            }


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "submit_at_once": submit_at_once,
    "list_long_history": list_long_history,
    "follow_at_once": follow_at_once,
    "take_in": take_in,
    "restart": restart,
}


def main() -> None:
    """Every part, or those named on the command line."""
    chosen = [name for name in sys.argv[1:] if name in PARTS] or list(PARTS)
    record("service", {name: PARTS[name]() for name in chosen}, store="SQLite")


def _away() -> dict[str, str]:
    return {"SYNCBN_RAY_ADDRESS": _NOWHERE, "SYNCBN_RATE_LIMIT": "1000000/second"}


async def _post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: SplitResult, body: bytes) -> None:
    """Submit a spec over a connection that stays open, and read the answer to its end."""
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    assert answer.startswith("http/1.1 201"), answer
    await reader.readexactly(int(answer.partition("content-length: ")[2].partition("\r")[0]))


def _percentiles(durations_ms: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(durations_ms, n=100, method="inclusive")
    return {
        "median_ms": cuts[49],
        "p90_ms": cuts[89],
        "p99_ms": cuts[98],
        "max_ms": max(durations_ms),
        "n": len(durations_ms),
    }


def _timed(http: httpx2.Client, path: str, query: Mapping[str, str | int]) -> float:
    began = time.perf_counter()
    assert http.get(path, params=query).status_code == 200
    return 1e3 * (time.perf_counter() - began)


def _make_history(folder: Path, num_jobs: int) -> None:
    """``num_jobs`` ended jobs: one made by the store, the others copies of its row with ids and times of their own."""
    store = JobStore.open(folder / "syncbn.sqlite")
    job, _ = store.create(JobSpec(name="old", epochs=1))
    store.transition(job, JobState.CANCELLED)
    store.close()
    connection = sqlite3.connect(folder / "syncbn.sqlite")
    connection.row_factory = sqlite3.Row
    row = dict(connection.execute("SELECT * FROM jobs").fetchone())
    created = row["created_at"]
    columns = ", ".join(row)
    places = ", ".join(f":{name}" for name in row)
    states = ("succeeded", "cancelled", "failed")
    connection.executemany(
        f"INSERT INTO jobs ({columns}) VALUES ({places})",
        (
            row | {"id": new_job_id(), "created_at": created - 1000 * n, "state": states[n % 3]}
            for n in range(1, num_jobs)
        ),
    )
    connection.commit()
    connection.close()


def _running_jobs(folder: Path, num_jobs: int) -> list[tuple[str, str]]:
    """Jobs whose one attempt runs, with their tokens."""
    store = JobStore.open(folder / "syncbn.sqlite")
    running = []
    for number in range(num_jobs):
        job, token = store.start_attempt(store.create(JobSpec(name=f"running {number}", epochs=1))[0])
        store.transition(job, JobState.RUNNING, phase=Phase.TRAINING)
        running.append((job.id, token))
    store.close()
    return running


def _telemetry(events: Sequence[TelemetryEvent], first_seq: int) -> str:
    part = RankBatch(rank=0, first_seq=first_seq, times=(time.time(),) * len(events), events=tuple(events))
    return IngestBatch(batches=(part,)).model_dump_json()


def _step(number: int) -> StepMetrics:
    return StepMetrics(step=number, epoch=0, loss=1 / number, learning_rate=0.1, step_s=0.01)


def _started(now_ms: int) -> RankStarted:
    """An event of some hundred bytes that carries the time of its telling."""
    return RankStarted(
        world_size=2,
        host="here",
        pid=1,
        device="cpu",
        resumed_step=0,
        total_steps=100,
        steps_per_epoch=now_ms,
        num_train_images=1,
        num_validation_images=1,
        num_classes=10,
        num_parameters=1,
        torch_version="2",
        syncbn_version="0",
    )


if __name__ == "__main__":
    main()
