"""From POST to the first training step that the API shows, with the local Ray head already running."""

import time

from benchmarks.record import record, spread
from benchmarks.running_service import running_service, wait_until_ready
from service.client import Client
from service.jobs import JobSpec

NUM_JOBS = 6
_LIMIT_S = 60.0


def main() -> None:
    """Start jobs one after the other; the first, which also fills caches, is told apart."""
    with running_service() as client:
        started = time.perf_counter()
        wait_until_ready(client)
        head_s = time.perf_counter() - started
        seconds = [_first_step_s(client) for _ in range(NUM_JOBS)]
    record(
        "first_step",
        {"head_ready_s": head_s, "first_job_s": seconds[0], "next_jobs_s": spread(seconds[1:])},
        workers=2,
        poll_s=0.01,
    )


def _first_step_s(client: Client) -> float:
    start = time.perf_counter()
    job = client.submit(JobSpec(name="first step", max_steps=20, batch_size_per_worker=2))
    reached: float | None = None
    while time.perf_counter() - start < _LIMIT_S:
        now = client.job(job.id)
        if reached is None and now.progress is not None and now.progress.step >= 1:
            reached = time.perf_counter() - start
        if now.state.terminal:
            break
        time.sleep(0.01)
    assert reached is not None, client.job(job.id)
    return reached


if __name__ == "__main__":
    main()
