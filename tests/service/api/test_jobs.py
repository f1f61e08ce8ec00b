from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.jobs import Job, JobPage, JobReport, JobState
from tests.service.api.house import House
from tests.service.store.telling import drift, evaluation, spec, started, step

SPEC = {"name": "digits", "max_steps": 100}


def _pointers(answer: Any) -> set[str]:
    assert answer.status_code == 422, answer.text
    return {problem["pointer"] for problem in answer.json()["errors"]}


def test_a_submitted_job_is_created_and_can_be_read_where_location_says(client: TestClient) -> None:
    answer = client.post("/v1/jobs", json=SPEC)
    assert answer.status_code == 201
    job = Job.model_validate_json(answer.content)
    assert (job.spec, job.state) == (spec(), JobState.QUEUED)
    assert Job.model_validate_json(client.get(answer.headers["Location"]).content) == job


def test_a_replay_answers_with_the_first_job(client: TestClient, house: House) -> None:
    first = client.post("/v1/jobs", json=SPEC, headers={"Idempotency-Key": "k"})
    house.max_workers = 0  # the cluster has shrunk; the job exists all the same
    again = client.post("/v1/jobs", json=SPEC | {"num_workers": 2}, headers={"Idempotency-Key": "k"})
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    assert again.headers["Idempotency-Replayed"] == "true"
    assert again.headers["Location"] == first.headers["Location"]
    assert "Idempotency-Replayed" not in first.headers
    other = client.post("/v1/jobs", json=SPEC | {"seed": 1}, headers={"Idempotency-Key": "k"})
    assert _pointers(other) == {"/Idempotency-Key"}


def test_every_wrong_field_is_named_at_once(client: TestClient) -> None:
    answer = client.post(
        "/v1/jobs",
        json={
            "name": "",
            "colour": "blue",
            "num_workers": 5,
            "seed": -1,
            "optimizer": {"name": "sgd", "learning_rate": 0, "momentum": "much"},
            "model": {"name": "mlp", "hidden_sizes": [64, 0]},
            "schedule": {"name": "cosine", "warmup": 3},
            "data": "builtin:nothing",
        },
    )
    assert _pointers(answer) == {
        "/name",
        "/colour",
        "/seed",
        "/optimizer/learning_rate",
        "/optimizer/momentum",
        "/model/hidden_sizes/1",
        "/schedule/warmup",
        "/data",
        "/epochs",
        "/num_workers",  # what the cluster cannot hold is said beside what no cluster could read
    }


def test_what_the_cluster_cannot_hold_is_refused(client: TestClient, house: House) -> None:
    answer = client.post("/v1/jobs", json=SPEC | {"num_workers": 5})
    assert _pointers(answer) == {"/num_workers"}
    assert house.store.unfinished() == []


def test_a_field_is_named_once_even_if_the_cluster_minds_it_too(client: TestClient) -> None:
    answer = client.post("/v1/jobs", json=SPEC | {"num_workers": 5000})
    assert [problem["code"] for problem in answer.json()["errors"]] == ["less_than_equal"]


def test_a_cluster_that_does_not_answer_is_a_503_to_try_again(client: TestClient, house: House) -> None:
    house.cluster_answers = False
    answer = client.post("/v1/jobs", json=SPEC)
    assert (answer.status_code, answer.json()["code"]) == (503, "cluster_unreachable")
    assert answer.json()["retryable"] is True
    assert int(answer.headers["Retry-After"]) > 0


@pytest.mark.parametrize("body", [None, [], "text", 3, {"name": ["x"]}])
def test_what_is_no_spec_at_all_is_refused(client: TestClient, body: object) -> None:
    assert client.post("/v1/jobs", json=body).status_code == 422


def test_jobs_are_listed_in_pages_and_filtered(client: TestClient, house: House) -> None:
    for index in range(5):
        job, _ = house.store.create(spec(f"job {index}"))
        if index == 0:
            house.store.transition(job, JobState.CANCELLED)
    first = JobPage.model_validate_json(client.get("/v1/jobs?limit=3").content)
    rest = JobPage.model_validate_json(client.get("/v1/jobs", params={"cursor": first.next_cursor}).content)
    assert len(first.items) == 3
    assert rest.next_cursor is None
    assert {job.spec.name for job in (*first.items, *rest.items)} == {f"job {index}" for index in range(5)}
    filtered = client.get("/v1/jobs?state=cancelled&state=failed").json()["items"]
    assert [job["spec"]["name"] for job in filtered] == ["job 0"]
    assert [job["spec"]["name"] for job in client.get("/v1/jobs?name=job 2").json()["items"]] == ["job 2"]


def test_wrong_parameters_are_named(client: TestClient) -> None:
    assert _pointers(client.get("/v1/jobs?limit=0&state=asleep")) == {"/limit", "/state/0"}
    assert _pointers(client.get("/v1/jobs?cursor=mine")) == {"/cursor"}


def test_the_report_is_made_of_what_is_stored(client: TestClient, house: House) -> None:
    steps = [step(n + 1, loss=2.0 - n / 100) for n in range(30)]
    job, _ = house.running_job(started(), *steps, evaluation(30), drift(30, bn=0.5))
    report = JobReport.model_validate_json(client.get(f"/v1/jobs/{job.id}/report").content)
    assert (report.job_id, report.num_steps, report.num_attempts) == (job.id, 30, 1)
    assert report.last_evaluation is not None
    assert report.last_evaluation.stored.accuracy == 0.75


@pytest.mark.parametrize(("num_classes", "verdict"), [(2, "diverged"), (10, "undecided")])
def test_the_report_judges_by_the_number_of_classes_that_the_ranks_found(
    client: TestClient, house: House, num_classes: int, verdict: str
) -> None:
    # A loss of 3 is over twice that of guessing between 2 classes (0.69), not between 10 (2.30).
    steps = [step(n + 1, loss=3.0) for n in range(60)]
    start = started().model_copy(update={"num_classes": num_classes})
    job, _ = house.running_job(start, *steps, wanted=spec().model_copy(update={"data": "idx:/images"}))
    report = JobReport.model_validate_json(client.get(f"/v1/jobs/{job.id}/report").content)
    assert report.convergence.verdict == verdict
