"""How long the API takes to accept a job and to tell about it, over HTTP on loopback, one client at a time.

The service is given a cluster that does not answer, so that the jobs stay queued and only the API is measured.
"""

import tempfile
import time
from pathlib import Path

from benchmarks.record import record, spread
from benchmarks.running_service import running_service
from service.jobs import IngestBatch, JobSpec, RankBatch, StepMetrics, attempt_id
from service.store import JobStore

NUM_JOBS = 300
NUM_WARMUP = 20


def main() -> None:
    """Submit jobs, get each of them, and list them."""
    submit_ms, get_ms, list_ms = [], [], []
    with running_service(SYNCBN_RAY_ADDRESS="http://127.0.0.1:9") as client:
        for number in range(NUM_WARMUP + NUM_JOBS):
            spec = JobSpec(name=f"job {number}", epochs=1)
            start = time.perf_counter()
            job = client.submit(spec)
            submitted = time.perf_counter()
            client.job(job.id)
            got = time.perf_counter()
            client.jobs(limit=50)
            listed = time.perf_counter()
            if number >= NUM_WARMUP:
                submit_ms.append(1e3 * (submitted - start))
                get_ms.append(1e3 * (got - submitted))
                list_ms.append(1e3 * (listed - got))
    record(
        "api_latency",
        {
            "submit_ms": spread(submit_ms),
            "get_ms": spread(get_ms),
            "list_50_ms": spread(list_ms),
            "store_1000_steps_ms": spread(_ingest_ms()),
        },
        jobs=NUM_JOBS,
        store="SQLite",
    )


def _ingest_ms() -> list[float]:
    """Storing 1,000 steps of one rank at a time, without HTTP."""
    durations = []
    with tempfile.TemporaryDirectory(prefix="syncbn-bench-") as folder:
        store = JobStore.open(Path(folder) / "jobs.sqlite")
        job, token = store.start_attempt(store.create(JobSpec(name="ingest", epochs=1))[0])
        for first in range(0, 30_000, 1000):
            steps = tuple(
                StepMetrics(step=first + n + 1, epoch=0, loss=1.0, learning_rate=0.1, step_s=0.01) for n in range(1000)
            )
            batch = RankBatch(rank=0, first_seq=first, times=(0.0,) * 1000, events=steps)
            start = time.perf_counter()
            store.ingest(attempt_id(job.id, 1), token, IngestBatch(batches=(batch,)))
            durations.append(1e3 * (time.perf_counter() - start))
        store.close()
    return durations


if __name__ == "__main__":
    main()
