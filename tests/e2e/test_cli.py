"""The command line against a real service, as a user types it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from service.cluster.head_record import read_record
from service.doctor.cluster import look_at_cluster
from service.settings import Settings
from tests.e2e.conftest import RunningService, small_spec

SYNCBN = str(Path(sys.executable).with_name("syncbn"))
"""The command as the package installs it."""


def syncbn(service: RunningService, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run one command against the service."""
    return subprocess.run(
        [SYNCBN, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=100,
        env={
            "SYNCBN_URL": service.url,
            "SYNCBN_DATA_DIR": str(service.data_dir),
            "PATH": "/usr/bin:/bin",
            "COLUMNS": "120",
        },
    )


def answered(result: subprocess.CompletedProcess[str]) -> Any:
    """The JSON of a command that succeeded."""
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_job_is_submitted_watched_and_shown(service: RunningService, tmp_path: Path) -> None:
    spec = tmp_path / "job.toml"
    spec.write_text('name = "by hand"\nnum_workers = 2\nbatch_size_per_worker = 8\nmax_steps = 20\n')
    small = ["--set", "model.hidden_sizes=[8]"]
    job = answered(syncbn(service, "submit", str(spec), "--set", "model.name=mlp", *small, "--json"))
    assert job["spec"]["model"] == {"name": "mlp", "hidden_sizes": [8]}
    watched = syncbn(service, "watch", job["id"])
    assert watched.returncode == 0, watched.stderr
    assert "succeeded" in watched.stdout
    assert "20/20" in watched.stdout
    events = [json.loads(line) for line in syncbn(service, "watch", job["id"], "--json").stdout.splitlines()]
    assert events[-1]["type"] == "end"
    shown = answered(syncbn(service, "show", job["id"], "--json"))
    assert (shown["state"], shown["progress"]["step"]) == ("succeeded", 20)
    assert "by hand" in syncbn(service, "show", job["id"]).stdout
    assert answered(syncbn(service, "show", "--report", job["id"], "--json"))["complete"] is True
    report = syncbn(service, "show", "--report", job["id"]).stdout
    assert "convergence" in report
    assert "population statistics" in report
    records = [json.loads(line) for line in syncbn(service, "logs", job["id"], "--json").stdout.splitlines()]
    assert {record["attempt"] for record in records} == {1}
    listed = answered(syncbn(service, "list", "--state", "succeeded", "--json"))
    assert job["id"] in [item["id"] for item in listed["items"]]
    assert job["id"] in syncbn(service, "list").stdout


def test_a_spec_is_planned_before_it_is_submitted(service: RunningService, tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(small_spec("planned", max_steps=5).model_dump_json())
    planned = syncbn(service, "plan", str(path), "--set", "num_workers=1")
    assert planned.returncode == 0, planned.stderr
    for words in ("8 images a step; 8 share one batch statistic", "5, 179 an epoch of 1437 images", "could hold it"):
        assert words in planned.stdout
    too_large = syncbn(service, "plan", str(path), "--set", "num_workers=100", "--json")
    assert too_large.returncode == 1
    assert json.loads(too_large.stdout)["placement"][0]["pointer"] == "/num_workers"


def test_a_job_is_cancelled_and_watch_tells_that_it_did_not_succeed(service: RunningService) -> None:
    spec = small_spec("to cancel", max_steps=1_000_000).model_dump_json()
    job = answered(syncbn(service, "submit", "-", "--json", stdin=spec))
    cancelled = answered(syncbn(service, "cancel", job["id"], "--json"))
    assert cancelled["state"] in ("cancelling", "cancelled")
    watched = syncbn(service, "watch", job["id"])
    assert watched.returncode == 1
    assert "cancelled" in watched.stdout


def test_the_same_idempotency_key_gives_the_same_job(service: RunningService) -> None:
    spec = small_spec("once", max_steps=1).model_dump_json()
    first, second = (
        answered(syncbn(service, "submit", "-", "--idempotency-key", "k1", "--json", stdin=spec)) for _ in range(2)
    )
    assert first["id"] == second["id"]


def test_every_wrong_field_is_one_line_on_stderr(service: RunningService) -> None:
    wrong = '{"name": "x", "epochs": 1, "num_workers": 4000, "sede": 1}'
    result = syncbn(service, "submit", "-", stdin=wrong)
    assert result.returncode == 1
    assert "/sede" in result.stderr
    assert "Traceback" not in result.stderr
    machine = syncbn(service, "submit", "-", "--json", stdin=wrong)
    assert json.loads(machine.stderr)["errors"][0]["pointer"] == "/sede"


def test_a_job_that_does_not_exist_is_one_line(service: RunningService) -> None:
    result = syncbn(service, "show", "job_none")
    assert result.returncode == 1
    assert "job_none" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_service_that_does_not_run_is_named_with_the_remedy(tmp_path: Path) -> None:
    nobody = RunningService(tmp_path)
    nobody.url = "http://127.0.0.1:9"
    result = syncbn(nobody, "list")
    assert result.returncode == 1
    assert "http://127.0.0.1:9" in result.stderr
    assert "syncbn serve" in result.stderr


def test_the_doctor_finds_nothing_wrong_here_and_a_wrong_token_of_the_cluster(service: RunningService) -> None:
    found = syncbn(service, "doctor", "--json")
    findings = json.loads(found.stdout)
    assert [f for f in findings if not f["ok"]] == []
    assert found.returncode == 0
    head = read_record(service.data_dir / "ray" / "head.json")
    assert head is not None
    for token, ok in ((head.token, True), (None, False), ("of another cluster", False)):
        settings = Settings.model_validate({"ray_address": head.address, "ray_token": token})
        (cluster,) = look_at_cluster(settings)
        assert cluster.ok is ok, cluster
        assert ("SYNCBN_RAY_TOKEN" in cluster.remedy) is not ok
