"""What records mean, over HTTP: real facts told to a real store."""

import json

import pytest
from fastapi.testclient import TestClient

from service.jobs import JobReport, JobSpec, JobState, LayerHistory, Reason, Role, SideBySide
from service.store import Retention
from tests.service.api.house import House
from tests.service.store.telling import drift, evaluation, sample, spec, started, step


def finished(house: House, accuracy: float, **fields: object) -> str:
    wanted = JobSpec.model_validate({"name": "digits", "max_steps": 100} | fields)
    job, _ = house.running_job(started(), step(10), evaluation(10, accuracy=accuracy), wanted=wanted)
    return house.store.transition(house.store.get(job.id), JobState.SUCCEEDED).id


def compared(client: TestClient, *ids: str, **params: str) -> SideBySide:
    answer = client.get("/v1/jobs:compare", params={"job": list(ids), **params})
    assert answer.status_code == 200, answer.text
    return SideBySide.model_validate_json(answer.content)


def test_a_report_is_made_from_all_that_was_told(client: TestClient, house: House) -> None:
    job, _ = house.running_job(started(), step(10), evaluation(10), drift(10, bn=0.5), sample(10, bn=1.0))
    report = JobReport.model_validate_json(client.get(f"/v1/jobs/{job.id}/report").content)
    assert (report.num_steps, report.complete) == (10, False)
    assert report.drift.worst_layer is not None
    assert report.drift.worst_layer.layer == "bn"


def test_layers_are_read_over_time_by_patterns(client: TestClient, house: House) -> None:
    facts = [sample(n, first=float(n), second=float("nan")) for n in range(30)]
    job, _ = house.running_job(started(), drift(10, first=0.5, second=0.25), *facts)
    url = f"/v1/jobs/{job.id}/bn"
    whole = LayerHistory.model_validate_json(client.get(url).content)
    assert whole.layers == ("first", "second")
    assert "drift/rms_mean_shift" in whole.metrics
    asked = {"layer": "s*", "metric": ["sample/max_abs_z", "drift/rms_*"], "max_points": "10", "first_step": "5"}
    told = client.get(url, params=asked).json()
    assert [(found["layer"], found["metric"]) for found in told["series"]] == [
        ("second", "drift/rms_mean_shift"),
        ("second", "sample/max_abs_z"),
    ]
    thin = told["series"][1]
    assert set(thin["values"]) == {"NaN"}
    assert (thin["num_points"], len(thin["values"]) <= 10, bool(thin["downsampled"])) == (25, True, True)
    for wrong in ({"layer": "third"}, {"metric": "rms"}):
        assert client.get(url, params=wrong).status_code == 404
    assert client.get(url, params={"max_points": "9"}).json()["errors"][0]["pointer"] == "/max_points"
    house.store.transition(house.store.get(job.id), JobState.SUCCEEDED)
    house.store.forget(Retention(metrics_days=0))
    assert client.get(url).status_code == 410


def test_settings_are_compared_over_seeds_with_the_exact_p(client: TestClient, house: House) -> None:
    local = [finished(house, 0.80 + 0.01 * seed, seed=seed, normalization="local") for seed in range(6)]
    sync = [finished(house, 0.85 + 0.01 * seed, seed=seed, name=f"run {seed}") for seed in range(6)]
    told = compared(client, *local, *sync)
    assert [(group.name, group.job_ids) for group in told.groups] == [
        ("normalization=local", tuple(local)),
        ("normalization=sync", tuple(sync)),
    ]
    (comparison,) = told.comparisons
    assert (comparison.verdict, comparison.paired) == ("second_better", True)
    assert comparison.p == pytest.approx(2 / 2**6, abs=1e-12)  # all 64 signs, of which two are as extreme
    assert comparison.smallest_p == pytest.approx(2 / 2**6, abs=1e-12)
    assert comparison.difference == pytest.approx(-0.05, abs=1e-12)
    assert [report.job_id for report in told.reports] == [*local, *sync]
    assert all(report.evaluations == () and report.last_evaluation for report in told.reports)
    few = compared(client, *local[:2], *sync[:2], metric="loss").comparisons[0]
    assert (few.metric, few.verdict) == ("loss", "undecided")


def test_what_is_no_evidence_is_left_out_and_says_why(client: TestClient, house: House) -> None:
    once, again = finished(house, 0.8, seed=1), finished(house, 0.8, seed=1)
    other = finished(house, 0.9, seed=1, bn_momentum=0.01)
    running, _ = house.running_job(started())
    diverged, _ = house.running_job(started(), step(1), evaluation(1, accuracy=0.99), wanted=spec(max_steps=7))
    house.store.transition(diverged, JobState.FAILED, reason=Reason.DIVERGED)
    told = compared(client, once, again, other, running.id, diverged.id)
    assert {left.job_id: left.why.split(",")[0] for left in told.left_out} == {
        once: f"it repeats {again}",
        running.id: "it is running: only a run that is over has a last score",
    }
    assert [group.job_ids for group in told.groups] == [(again,), (other,), (diverged.id,)]
    without_score = [c for c in told.comparisons if "max_steps=7" in (c.first + c.second)]
    assert without_score
    assert all("no finite score" in c.sentence for c in without_score)
    alone = compared(client, again, running.id)
    assert (alone.comparisons, "seeds alone" in alone.sentence) == ((), True)
    assert "nothing to compare" in compared(client, running.id, running.id).sentence


def test_others_jobs_cannot_be_compared_and_the_number_of_jobs_is_bounded(house: House) -> None:
    mia, admin = house.key("mia", Role.SUBMITTER), house.key("root", Role.ADMIN)
    own, _ = house.store.create(spec(), owner="mia")
    others, _ = house.store.create(spec(), owner="tom")
    with house.client() as client:
        url = "/v1/jobs:compare"
        asked = {"job": [own.id, others.id]}
        hidden = client.get(url, params=asked, headers=mia)
        missing = client.get(url, params={"job": [own.id, "job_none"]}, headers=mia)
        assert (hidden.status_code, missing.status_code) == (404, 404)
        assert hidden.json()["detail"] == f"there is no job {others.id}"
        assert client.get(url, params=asked, headers=admin).status_code == 200
        assert client.get(url, params=asked).status_code == 401
        for ids in ([own.id], [own.id] * 65):
            refused = client.get(url, params={"job": ids}, headers=mia)
            assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/job")
        assert client.get(f"/v1/jobs/{others.id}/bn", headers=mia).status_code == 404
        assert "drift" in json.loads(client.get(f"/v1/jobs/{own.id}/report", headers=mia).content)
