import json
import math

import pytest
from fastapi.testclient import TestClient

from service.jobs import Drift, IngestBatch, JobState, LogLine, MetricSeries, attempt_id
from service.store import Retention
from tests.service.api.house import House
from tests.service.store.telling import batch, drift, evaluation, spec, started, step


def _refuse_bare(constant: str) -> float:
    raise AssertionError(f"a bare {constant} is no JSON")


def test_metrics_are_named_and_read(client: TestClient, house: House) -> None:
    job, _ = house.running_job(started(), *[step(n, loss=float(n)) for n in range(1, 31)])
    names = client.get(f"/v1/jobs/{job.id}/metrics").json()["items"]
    assert names == ["train/learning_rate", "train/loss", "train/step_s"]
    url = f"/v1/jobs/{job.id}/metrics/train/loss"
    whole = MetricSeries.model_validate_json(client.get(url).content)
    assert whole.values == tuple(float(n) for n in range(1, 31))
    part = client.get(url, params={"rank": 0, "first_step": 4, "last_step": 5}).json()
    assert (part["rank"], part["steps"], part["num_points"], part["downsampled"]) == (0, [4, 5], 2, None)
    thin = client.get(url, params={"max_points": 10}).json()
    assert len(thin["steps"]) <= 10
    assert {1, 30} <= set(thin["steps"])
    assert thin["downsampled"]


@pytest.mark.parametrize("query", ["max_points=5001", "max_points=9", "rank=-1", "first_step=x", f"last_step={2**60}"])
def test_impossible_ranges_are_refused(client: TestClient, house: House, query: str) -> None:
    job, _ = house.store.create(spec())
    answer = client.get(f"/v1/jobs/{job.id}/metrics/train/loss?{query}")
    assert answer.status_code == 422
    assert [problem["pointer"] for problem in answer.json()["errors"]] == ["/" + query.partition("=")[0]]


def test_non_finite_numbers_are_strings_everywhere(client: TestClient, house: House) -> None:
    facts = (step(1, math.nan), step(2, math.inf), step(3, -math.inf), evaluation(3, math.nan), drift(3, bn=math.nan))
    job, _ = house.running_job(started(), *facts)
    paths = ("", "/metrics/train/loss", "/drift", "/events", "/report")
    told = {p: json.loads(client.get(f"/v1/jobs/{job.id}{p}").text, parse_constant=_refuse_bare) for p in paths}
    assert told["/metrics/train/loss"]["values"] == ["NaN", "Infinity", "-Infinity"]
    assert told["/drift"]["items"][0]["layers"][0]["rms_mean_shift"] == "NaN"
    assert told[""]["progress"]["worst_layer_drift"] == "NaN"
    assert told["/events"]["items"][4]["body"]["stored"]["loss"] == "NaN"
    series = MetricSeries.model_validate(told["/metrics/train/loss"])
    assert math.isnan(series.values[0])


def test_what_has_been_forgotten_is_gone_and_what_happened_is_not(client: TestClient, house: House) -> None:
    job, _ = house.running_job(started(), step(1), evaluation(1), drift(1, bn=0.5))
    house.store.transition(job, JobState.SUCCEEDED)
    house.store.forget(Retention(metrics_days=0, logs_days=0, events_days=0))
    for path, what in {
        "metrics": "metrics",
        "metrics/train/loss": "metrics",
        "report": "metrics",
        "drift": "events",
        "logs": "logs",
    }.items():
        answer = client.get(f"/v1/jobs/{job.id}/{path}")
        assert (answer.status_code, answer.json()["code"], answer.json()["retryable"]) == (410, "gone", False)
        assert f"the {what} of {job.id} were forgotten at 2" in answer.json()["detail"]
    assert client.get(f"/v1/jobs/{job.id}").json()["state"] == "succeeded"
    events = client.get(f"/v1/jobs/{job.id}/events").json()["items"]
    assert [event["type"] for event in events][3:] == ["rank_started", "evaluation", "drift", "state_changed"]


def test_drift_can_be_read_for_one_layer(client: TestClient, house: House) -> None:
    job, _ = house.running_job(drift(1, a=0.5, b=1.5), drift(2, a=0.25, b=0.75))
    url = f"/v1/jobs/{job.id}/drift"
    every = [Drift.model_validate(item) for item in client.get(url).json()["items"]]
    assert every == [drift(1, a=0.5, b=1.5), drift(2, a=0.25, b=0.75)]
    only = [Drift.model_validate(item) for item in client.get(url, params={"layer": "b"}).json()["items"]]
    assert only == [drift(1, b=1.5), drift(2, b=0.75)]
    unknown = client.get(url, params={"layer": "c"})
    assert unknown.status_code == 404
    assert "a, b" in unknown.json()["detail"]
    job, _ = house.store.create(spec())
    assert client.get(f"/v1/jobs/{job.id}/drift?layer=c").json() == {"items": []}


def test_events_and_logs_are_read_in_pages(client: TestClient, house: House) -> None:
    job, _ = house.running_job(started(), *[LogLine(text=f"line {n}") for n in range(5)])
    events = client.get(f"/v1/jobs/{job.id}/events?after=1&limit=2").json()["items"]
    assert [(event["seq"], event["type"]) for event in events] == [(2, "state_changed"), (3, "state_changed")]
    logs = client.get(f"/v1/jobs/{job.id}/logs?after=2&limit=2").json()["items"]
    assert [(record["seq"], record["text"]) for record in logs] == [(3, "line 2"), (4, "line 3")]


def test_logs_are_plain_text_for_those_who_ask(client: TestClient, house: House) -> None:
    job, _ = house.running_job(LogLine(text="it is 5 °C", level="warning"))
    answer = client.get(f"/v1/jobs/{job.id}/logs", headers={"Accept": "text/plain"})
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.text == "2023-11-14T22:13:20.250000Z attempt 1 rank 0 warning: it is 5 °C\n"


@pytest.mark.parametrize(
    "path", ["", "/metrics", "/metrics/train/loss", "/drift", "/events", "/logs", "/report", "/stream"]
)
def test_there_is_nothing_of_a_job_that_does_not_exist(client: TestClient, path: str) -> None:
    answer = client.get(f"/v1/jobs/job_none{path}")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_an_unknown_metric_is_not_found(client: TestClient, house: House) -> None:
    job, _ = house.store.create(spec())
    answer = client.get(f"/v1/jobs/{job.id}/metrics/train/nothing")
    assert answer.status_code == 404
    assert "train/loss" in answer.json()["detail"]


def test_an_attempt_reports_with_its_own_token(client: TestClient, house: House) -> None:
    job, token = house.running_job()
    url = f"/v1/attempts/{attempt_id(job.id, 1)}/telemetry"
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    told = batch([started(), step(1, math.nan)])
    answer = client.post(url, content=told.model_dump_json(), headers=headers)
    wanted = {"control": "continue", "next_seq": {"0": 2}, "checkpoint_requests": 0}
    assert (answer.status_code, answer.json()) == (200, wanted)
    assert math.isnan(house.store.metric(job.id, "train/loss").values[0])
    for wrong in ({}, {"Authorization": "Bearer no"}, {"Authorization": f"Basic {token}"}):
        refused = client.post(url, json={"batches": []}, headers=wrong)
        assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
    house.store.transition(house.store.get(job.id), JobState.CANCELLING)
    answer = client.post(url, content=IngestBatch(batches=()).model_dump_json(), headers=headers)
    assert answer.json() == wanted | {"control": "abort"}


def test_a_wrong_report_is_named_by_its_place(client: TestClient, house: House) -> None:
    job, token = house.running_job()
    url = f"/v1/attempts/{attempt_id(job.id, 1)}/telemetry"
    fact = json.loads(step(1).model_dump_json()) | {"loss": "much"}
    told = {
        "batches": [{"rank": 0, "first_seq": 0, "times": [1.0, 2.0], "events": [{"type": "log", "text": ""}, fact]}]
    }
    answer = client.post(url, json=told, headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code == 422
    assert [problem["pointer"] for problem in answer.json()["errors"]] == ["/batches/0/events/1/loss"]
