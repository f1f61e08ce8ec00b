"""Reports from the command line, against the real API over a real socket."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.commands.program import app
from service.errors import InvalidRequest
from service.jobs import JobSpec, JobState, LayerHistory, SideBySide
from service.report_page import PageRecord
from service.store import JobStore
from tests.service.api.house import House
from tests.service.api.live import listening
from tests.service.store.telling import drift, evaluation, sample, started, step


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    store = JobStore.open(tmp_path / "jobs.sqlite")
    yield House(store)
    store.close()


def run(url: str, *arguments: str) -> str:
    env = {"SYNCBN_URL": url, "COLUMNS": "240"}
    answer = CliRunner().invoke(app, arguments, env=env, catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    return answer.output


def finished(house: House, **fields: object) -> str:
    wanted = JobSpec.model_validate({"name": "digits", "max_steps": 100} | fields)
    told = (started(), step(1), evaluation(10), drift(10, b=0.5), sample(20, b=4.5), sample(40, b=float("nan")))
    job, _ = house.running_job(*told, wanted=wanted)
    return house.store.transition(house.store.get(job.id), JobState.SUCCEEDED).id


def test_a_report_is_written_as_a_page_or_as_json(house: House, tmp_path: Path) -> None:
    job_id = finished(house)
    page, record, wrong = tmp_path / "report.html", tmp_path / "report.json", tmp_path / "report.pdf"
    with listening(house.app()) as url:
        assert run(url, "report", job_id, "-o", str(page)) == f"wrote {page}\n"
        assert json.loads(run(url, "report", job_id, "-o", str(record), "--json")) == {"path": str(record)}
        with pytest.raises(InvalidRequest, match=r"must end in .html or .json"):
            run(url, "report", job_id, "-o", str(wrong))
        with pytest.raises(InvalidRequest, match="cannot be written: No such file"):
            run(url, "report", job_id, "-o", str(tmp_path / "nowhere" / "report.json"))
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert job_id in page.read_text()
    assert PageRecord.model_validate_json(record.read_bytes()).report.job_id == job_id
    assert not wrong.exists()


def test_layers_and_jobs_are_shown_as_tables_or_as_json(house: House) -> None:
    sync, local = finished(house), finished(house, normalization="local")
    with listening(house.app()) as url:
        table = run(url, "bn", sync, "--metric", "sample/max_abs_z", "--metric", "drift/rms_mean_shift")
        told = LayerHistory.model_validate_json(run(url, "bn", sync, "--layer", "b*", "--json"))
        compared = run(url, "compare", sync, local)
        machine = SideBySide.model_validate_json(run(url, "compare", sync, local, "--metric", "loss", "--json"))
    assert "not finite at step 40" in table
    assert "4.5" in table
    assert {series.layer for series in told.series} == {"b"}
    for part in (sync, local, "normalization=sync", "normalization=local", "can never claim p < 0.05"):
        assert part in compared
    assert machine.comparisons[0].metric == "loss"
