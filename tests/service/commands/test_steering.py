"""Steering a job from the command line, against the real API over a real socket."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.commands.program import app
from service.jobs import Job, JobState, Phase, Reason
from service.store import JobStore
from tests.service.api.house import House
from tests.service.api.live import listening
from tests.service.store.telling import spec


@dataclass
class Shell:
    """Runs commands against one service."""

    url: str
    house: House

    def run(self, *arguments: str) -> str:
        env = {"SYNCBN_URL": self.url, "COLUMNS": "200"}
        answer = CliRunner().invoke(app, arguments, env=env, catch_exceptions=False)
        assert answer.exit_code == 0, answer.output
        return answer.output


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    store = JobStore.open(tmp_path / "jobs.sqlite")
    house = House(store)
    with listening(house.app()) as url:
        yield Shell(url, house)
    store.close()


def test_a_job_is_steered_by_commands(shell: Shell) -> None:
    store = shell.house.store
    job, _ = shell.house.running_job()
    assert shell.run("checkpoint", job.id) == f"{job.id} is asked for a checkpoint and is running\n"
    assert shell.run("pause", job.id) == f"{job.id} is pausing\n"
    store.transition(store.get(job.id), JobState.PAUSED)
    assert shell.run("resume", job.id, "--workers", "4") == f"{job.id} is queued\n"
    assert store.get(job.id).spec.num_workers == 4
    assert shell.run("priority", job.id, "-5") == f"{job.id} has priority -5 and is queued\n"
    told = Job.model_validate_json(shell.run("cancel", job.id, "--json"))
    assert (told.state, told.spec.priority) == (JobState.CANCELLED, -5)
    assert f" takes up {job.id} and is queued" in shell.run("retry", job.id, "--from-start")
    running, _ = shell.house.running_job()
    shell.run("cancel", running.id, "--checkpoint")
    assert store.get(running.id).stop_saves


def test_a_waiting_job_shows_its_owner_its_place_and_what_it_waits_for(shell: Shell) -> None:
    store = shell.house.store
    first, _ = store.create(spec(), owner="mia")
    job, _ = store.create(spec().model_copy(update={"after": (first.id,), "priority": 7}), owner="mia")
    store.set_queue_positions({job.id: 2})
    detail = f"starts after {first.id} (queued)"
    store.describe(job.id, phase=Phase.WAITING_JOBS, reason=Reason.WAITING_FOR_JOBS, detail=detail)
    for command in (("list",), ("show", job.id)):
        shown = shell.run(*command)
        for part in ("mia", "queued (waiting_jobs, place 2, priority 7)"):
            assert part in shown
    assert detail in shell.run("show", job.id)
