"""Checking and planning a spec over HTTP, with the real planner in its own process."""

from fastapi.testclient import TestClient

from service.jobs import JobSpec, PlannedJob
from service.planner import Planner
from tests.service.api.house import House

SPEC = {"name": "digits", "max_steps": 100}


def test_a_right_spec_comes_back_with_its_defaults_and_makes_no_job(client: TestClient) -> None:
    answer = client.post("/v1/jobs:validate", json=SPEC)
    assert (answer.status_code, JobSpec.model_validate(answer.json())) == (200, JobSpec.model_validate(SPEC))
    assert answer.json()["batch_size_per_worker"] == 32
    assert client.get("/v1/jobs").json()["items"] == []


def test_a_wrong_spec_is_refused_as_submitting_it_would_be(client: TestClient) -> None:
    wrong = SPEC | {"seed": -1, "num_workers": 5, "optimizer": {"name": "sgd", "momentum": 2}}
    submitted = client.post("/v1/jobs", json=wrong).json()
    for verb in ("validate", "plan"):
        answer = client.post(f"/v1/jobs:{verb}", json=wrong)
        assert answer.status_code == 422
        assert answer.json()["errors"] == submitted["errors"]
    assert len(submitted["errors"]) == 3


def test_a_plan_tells_batches_layers_and_exchanges(client: TestClient) -> None:
    answer = client.post("/v1/jobs:plan", json=SPEC | {"num_workers": 3, "batch_size_per_worker": 4})
    planned = PlannedJob.model_validate_json(answer.content)
    assert (planned.feasible, planned.placement) == (True, ())
    assert (planned.plan.global_batch_size, planned.plan.steps_per_epoch) == (12, 119)
    assert [layer.num_values for layer in planned.plan.layers] == [12, 12, 12]
    assert planned.plan.exchanges_per_step == 6


def test_a_plan_that_is_known_waits_for_no_other(client: TestClient) -> None:
    planner = Planner(timeout_s=60)
    planned = planner.plan(JobSpec.model_validate(SPEC))
    with planner._working:  # as while another plan is being made
        assert planner.plan(JobSpec.model_validate(SPEC | {"name": "another", "seed": 1})) == planned


def test_a_plan_too_large_for_the_cluster_is_made_and_says_so(client: TestClient, house: House) -> None:
    house.max_workers = 1
    planned = PlannedJob.model_validate_json(client.post("/v1/jobs:plan", json=SPEC).content)
    assert not planned.feasible
    assert [problem.pointer for problem in planned.placement] == ["/num_workers"]


def test_what_training_would_refuse_is_named_by_its_field(client: TestClient) -> None:
    for field, value in (("batch_size_per_worker", 1000), ("data", "idx:/nowhere")):
        answer = client.post("/v1/jobs:plan", json=SPEC | {field: value})
        assert answer.status_code == 422
        assert [problem["pointer"] for problem in answer.json()["errors"]] == [f"/{field}"]
