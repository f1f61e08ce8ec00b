"""What telemetry costs a training step, on a machine where ranks, runner, Ray and service share the cores.

Two reckonings. The processor's: how much CPU time everything that is not a rank takes while two ranks train, as a
share of what the ranks take; this bounds the loss from above when the cores are full. It counts the scheduler and the
API as well. The clock's: the time per
step of the same job under plain torchrun, which sends nothing, and through the service, in turns; that counts Ray's
own processes too. The first steps are left out: Ray is then still starting processes for later jobs.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.record import record, spread
from benchmarks.running_service import running_service, wait_until_ended, wait_until_ready
from service.client import Client
from service.jobs import JobSpec, ResNet20

NUM_ROUNDS = 3
NUM_STEPS = 400
_SKIPPED_STEPS = 200
_WINDOW_S = 15.0
_LIMIT_S = 300.0


def main() -> None:
    """Train `resnet20` on digits, two ranks with 32 images each."""
    with running_service() as client:
        wait_until_ready(client)
        share = _processor_share(client)
        rounds = [(_torchrun_step_s(), _service_step_s(client)) for _ in range(NUM_ROUNDS)]
    record(
        "telemetry",
        {
            "cpu_beside_ranks_over_cpu_of_ranks": share,
            "step_ms_torchrun": spread([1e3 * alone for alone, _ in rounds]),
            "step_ms_service": spread([1e3 * served for _, served in rounds]),
            "service_over_torchrun": spread([served / alone for alone, served in rounds]),
        },
        rounds=NUM_ROUNDS,
        steps=NUM_STEPS,
        window_s=_WINDOW_S,
        model="resnet20, 8x8 digits, 2 ranks, 32 images each",
    )


def _spec(max_steps: int) -> JobSpec:
    return JobSpec(name="telemetry", model=ResNet20(), max_steps=max_steps, batch_size_per_worker=32)


def _processor_share(client: Client) -> dict[str, float]:
    job = client.submit(_spec(10**6))
    _wait_for_step(client, job.id, _SKIPPED_STEPS)
    ranks = {event.body["pid"] for event in client.events(job.id) if event.type == "rank_started"}
    ours = [p for p in psutil.process_iter() if _belongs_to_us(p, ranks)]
    before, ranks_before = _cpu_s(ours), _cpu_s([psutil.Process(pid) for pid in ranks])
    time.sleep(_WINDOW_S)
    beside, of_ranks = _cpu_s(ours) - before, _cpu_s([psutil.Process(pid) for pid in ranks]) - ranks_before
    client.cancel(job.id)
    wait_until_ended(client, job.id)
    return {"share": beside / of_ranks, "beside_cpu_s": beside, "ranks_cpu_s": of_ranks}


def _belongs_to_us(process: psutil.Process, ranks: set[int]) -> bool:
    """The service and the runner; Ray's own processes idle along whether or not there is telemetry."""
    if process.pid in ranks or process.pid == os.getpid():
        return False
    try:
        line = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return "-m service serve" in line or "service.cluster.runner" in line


def _cpu_s(processes: list[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def _service_step_s(client: Client) -> float:
    job = client.submit(_spec(NUM_STEPS))
    wait_until_ended(client, job.id)
    series = client.metric(job.id, "train/step_s", rank=0, max_points=5000)
    assert len(series.values) == NUM_STEPS
    return statistics.median(series.values[_SKIPPED_STEPS:])


def _torchrun_step_s() -> float:
    with tempfile.TemporaryDirectory(prefix="syncbn-bench-") as folder:
        spec = Path(folder) / "spec.json"
        spec.write_text(_spec(NUM_STEPS).model_dump_json())
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += ["-m", "service.training", str(spec), "--storage", folder]
        environment = os.environ | {"TMPDIR": folder}  # torchrun leaves its log folder behind
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=True, env=environment)
        output = answer.stdout
    events = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    steps = [float(event["step_s"]) for event in events if event["type"] == "step"]
    assert len(steps) == NUM_STEPS
    return statistics.median(steps[_SKIPPED_STEPS:])


def _wait_for_step(client: Client, job_id: str, step: int) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline:
        progress = client.job(job_id).progress
        if progress is not None and progress.step >= step:
            return
        time.sleep(0.1)
    raise TimeoutError(f"{job_id} did not reach step {step} in {_LIMIT_S:g} s")


if __name__ == "__main__":
    main()
