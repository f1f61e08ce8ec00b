"""Scenarios as jobs of a real service: ordered over REST, trained in Ray workers, judged by the page that it shows."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.planted_faults.grafting import python_path
from benchmarks.planted_faults.page import Shown
from benchmarks.planted_faults.runs import path_of
from benchmarks.planted_faults.scenarios import SCENARIOS, Scenario
from benchmarks.running_service import running_service, wait_until_ended, wait_until_ready
from service.client import Client
from service.jobs import Job, JobReport, JobSpec, JobState, Retries, Timeouts

_JOB_S = 240.0


def has_way(scenario: Scenario) -> bool:
    """Whether a job can be ordered of which the service has something to say: nobody can, of what it leaves behind."""
    return scenario.examines is None


def run_jobs(trials: Sequence[tuple[str, int]]) -> Iterator[Shown]:
    """The trials, pairs of a scenario's key and a seed, one after the other on one service, small jobs first.

    Raises: TimeoutError if the service does not come up, or a job does not end, failures being ends too.
    """
    if not trials:
        return
    num_cpus = max(SCENARIOS[key].spec(seed).num_workers for key, seed in trials)
    with running_service(PYTHONPATH=python_path(), SYNCBN_LOCAL_RAY_CPUS=str(num_cpus)) as client:
        wait_until_ready(client)
        for key, seed in sorted(trials, key=_num_images):
            yield _run_job(client, SCENARIOS[key], seed)


def write_shown(run: Shown, folder: Path) -> None:
    """One file, whole or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"page": run.page.model_dump(mode="json"), "failures": run.failures, "seconds": run.seconds}
    path = path_of_shown(folder, run.scenario.key, run.seed)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(content))
    unfinished.replace(path)


def read_shown(folder: Path, key: str, seed: int) -> Shown:
    """What `write_shown` wrote."""
    content: dict[str, Any] = json.loads(path_of_shown(folder, key, seed).read_text())
    page = JobReport.model_validate(content["page"])
    return Shown(SCENARIOS[key], seed, page, tuple(content["failures"]), {}, content["seconds"])


def path_of_shown(folder: Path, key: str, seed: int) -> Path:
    """Where the page of a job lies, beside the telling of the same run without a service."""
    return path_of(folder, key, seed).with_suffix("").with_suffix(".job.json")


def _num_images(trial: tuple[str, int]) -> tuple[int, int]:
    key, seed = trial
    spec = SCENARIOS[key].spec(seed)
    return spec.num_workers, spec.global_batch_size * (spec.max_steps or 0)


def _run_job(client: Client, scenario: Scenario, seed: int) -> Shown:
    job_id = client.submit(_spec(scenario, seed)).id
    wait_until_ended(client, job_id, _JOB_S)
    job = client.job(job_id)
    assert job.finished_at is not None
    seconds = (job.finished_at - job.created_at).total_seconds()
    return Shown(scenario, seed, client.report(job_id), _failures(client, job), {}, seconds)


def _spec(scenario: Scenario, seed: int) -> JobSpec:
    """The first failure is the verdict: it is not tried again."""
    changes = {
        "timeouts": Timeouts(collective_s=scenario.timeout_s),
        "retries": Retries(infra=0, capacity=0, preempted=0, hang=0),
    }
    return scenario.spec(seed).model_copy(update=changes)


def _failures(client: Client, job: Job) -> tuple[str, ...]:
    """Why the job failed, and the words with which its ranks ended; nothing of one that succeeded."""
    if job.state is JobState.SUCCEEDED:
        return ()
    lines = (line.text for line in client.follow_logs(job.id) if line.level == "error")
    return (job.detail, *lines)
