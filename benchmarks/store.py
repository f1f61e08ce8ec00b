"""What metrics cost the store: writing, reading, and room on the disk, on SQLite without HTTP.

A point is one number of one metric of one rank at one step; each step of a rank has three: loss, learning rate and
duration. The losses are float32 noise around a decay and the durations full doubles, as training gives them. Room is
compared with the same steps as rows, which is the form that the newest of them have. Where the machine has other work
to do, the processor's time tells more than the clock's; it leaves out the wait for the disk at each commit.
"""

import math
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import insert, text

from benchmarks.record import record, spread
from service.jobs import IngestBatch, JobSpec, MetricSeries, RankBatch, StepMetrics, attempt_id
from service.store import STEP, JobStore
from service.store.schema import steps as rows

NUM_RANKS = 2
NUM_POINTS = 10**7
NUM_STEPS = NUM_POINTS // (3 * NUM_RANKS)
BATCH_STEPS = 25_000
SERIES_STEPS = 50_000
NUM_READS = 30


def main() -> None:
    """Fill one store with a job of ten million points, another with a million in rows."""
    with tempfile.TemporaryDirectory(prefix="syncbn-bench-") as folder:
        store = JobStore.open(Path(folder) / "chunks.sqlite")
        job_id, _ = _started_job(store)
        figures = _told("bulk", _write_in_bulk(store, job_id))
        for name, rates in _ingest(store).items():
            figures |= _told(f"ingest_{name}", rates)
        figures |= _read(store, job_id)
        figures["chunks_mib_per_million_points"] = _megabytes(store, "metric_chunks") / (NUM_POINTS / 1e6)
        store.close()
        figures["rows_mib_per_million_points"] = _rows_size(Path(folder) / "rows.sqlite")
    record("store", figures, ranks=NUM_RANKS, points=NUM_POINTS, points_a_step=3, store="SQLite")


def _started_job(store: JobStore) -> tuple[str, str]:
    job, token = store.start_attempt(store.create(JobSpec(name="metrics", epochs=1, num_workers=NUM_RANKS))[0])
    return job.id, token


def _steps(first: int, count: int) -> NDArray[np.void]:
    """Steps ``first`` and after of every rank."""
    noise = np.random.default_rng(first)
    told = np.zeros(count * NUM_RANKS, STEP)
    told["rank"] = np.repeat(np.arange(NUM_RANKS), count)
    told["step"] = np.tile(np.arange(first, first + count), NUM_RANKS)
    told["attempt"] = 1
    told["epoch"] = told["step"] // 100
    told["loss"] = (2 * np.exp(-told["step"] / 1e5) + noise.normal(0, 0.2, len(told))).astype(np.float32)
    told["learning_rate"] = 0.05 * (1 + np.cos(math.pi * told["step"] / NUM_STEPS))
    told["step_s"] = noise.gamma(50, 1e-3, len(told))
    return told


Seconds = tuple[float, float]
"""By the clock and by the processor."""


def _timed(work: Callable[[], object]) -> Seconds:
    start, start_cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - start_cpu


def _told(name: str, writes: list[tuple[int, Seconds]]) -> dict[str, object]:
    """Points a second, of writes of so many points each."""
    return {
        f"{name}_points_per_s": spread([points / clock for points, (clock, _) in writes]),
        f"{name}_points_per_cpu_s": spread([points / cpu for points, (_, cpu) in writes]),
    }


def _write_in_bulk(store: JobStore, job_id: str) -> list[tuple[int, Seconds]]:
    """Write until the job has all its points."""
    writes = []
    for first in range(1, NUM_STEPS + 1, BATCH_STEPS):
        told = _steps(first, min(BATCH_STEPS, NUM_STEPS + 1 - first))
        writes.append((3 * len(told), _timed(partial(store.record_steps, job_id, 1, told))))
    return writes


def _ingest(store: JobStore) -> dict[str, list[tuple[int, Seconds]]]:
    """Write through `JobStore.ingest`: what a runner sends twice a second, and what it has after a long outage."""
    writes: dict[str, list[tuple[int, Seconds]]] = {}
    for name, count, num_batches in (("live", 50, 400), ("backlog", 20_000, 6)):
        job_id, token = _started_job(store)
        writes[name] = []
        for number in range(num_batches):
            batch = _batch(_steps(number * count + 1, count), number * count)
            took = _timed(partial(store.ingest, attempt_id(job_id, 1), token, batch))
            writes[name].append((3 * count * NUM_RANKS, took))
    return writes


def _batch(told: NDArray[np.void], first_seq: int) -> IngestBatch:
    parts = []
    for rank in range(NUM_RANKS):
        facts = tuple(
            StepMetrics(step=step, epoch=epoch, loss=loss, learning_rate=learning_rate, step_s=step_s)
            for _, step, _, epoch, loss, learning_rate, step_s in told[told["rank"] == rank].tolist()
        )
        parts.append(RankBatch(rank=rank, first_seq=first_seq, times=(0.0,) * len(facts), events=facts))
    return IngestBatch(batches=tuple(parts))


def _read(store: JobStore, job_id: str) -> dict[str, object]:
    """Milliseconds of readings in the long job; its newest steps are rows, so the series are taken at its end."""
    first = NUM_STEPS - SERIES_STEPS + 1

    def series(rank: int | None) -> Callable[[], MetricSeries]:
        return lambda: store.metric(job_id, "train/loss", rank=rank, first_step=first, max_points=2000)

    def whole() -> MetricSeries:
        return store.training_loss(job_id)

    def one() -> MetricSeries:
        return store.metric(job_id, "train/loss", first_step=first, last_step=first)

    return {
        **_read_ms("read_2000_of_50000_of_a_rank", series(0), NUM_READS),
        **_read_ms("read_2000_of_50000_mean", series(None), NUM_READS),
        **_read_ms("read_one_step", one, NUM_READS),
        **_read_ms("report_losses_of_whole_run", whole, 5),
        "report_losses_of_whole_run_peak_mib": _peak_mib(whole),
        "exact_losses_of_whole_run_peak_mib": _peak_mib(lambda: store.metric(job_id, "train/loss", max_points=None)),
    }


def _read_ms(name: str, read: Callable[[], MetricSeries], times: int) -> dict[str, object]:
    took = [_timed(read) for _ in range(times)]
    return {
        f"{name}_ms": spread([1e3 * clock for clock, _ in took]),
        f"{name}_cpu_ms": spread([1e3 * cpu for _, cpu in took]),
    }


def _peak_mib(read: Callable[[], MetricSeries]) -> float:
    tracemalloc.start()
    read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def _rows_size(path: Path) -> float:
    """MiB for a million points of which none are in chunks."""
    store = JobStore.open(path)
    job_id, _ = _started_job(store)
    told = _steps(1, 10**6 // (3 * NUM_RANKS))
    names = STEP.names or ()
    with store._database.write() as connection:
        for at in range(0, len(told), 10_000):
            new = [dict(zip(names, row, strict=True)) for row in told[at : at + 10_000].tolist()]
            connection.execute(insert(rows), [{"job_id": job_id, **row} for row in new])
    size = _megabytes(store, "steps") / (3 * len(told) / 1e6)
    store.close()
    return size


def _megabytes(store: JobStore, table: str) -> float:
    """MiB of the pages of a table and its indices."""
    of_table = text("SELECT sum(pgsize) FROM dbstat WHERE name IN (SELECT name FROM sqlite_schema WHERE tbl_name = :t)")
    with store._database.read() as connection:
        return float(connection.execute(of_table, {"t": table}).scalar_one()) / 2**20


if __name__ == "__main__":
    main()
