"""Jobs that are paused, resumed, saved, cancelled, put in another place, and taken up again."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.errors import Conflict
from service.jobs import (
    CheckpointSaved,
    IngestBatch,
    Job,
    JobState,
    Phase,
    PrincipalTerms,
    Quota,
    Reason,
    Role,
    attempt_id,
)
from tests.service.api.house import House
from tests.service.store.telling import spec


def act(client: TestClient, job: Job, verb: str, body: object = None, **arguments: Any) -> Any:
    return client.post(f"/v1/jobs/{job.id}:{verb}", json=body, **arguments)


def move(house: House, job: Job, *states: JobState) -> Job:
    for state in states:
        job = house.store.transition(house.store.get(job.id), state)
    return job


def saved(step: int, path: Path) -> CheckpointSaved:
    return CheckpointSaved(step=step, path=str(path), size_bytes=1, duration_s=0.1)


def refused(answer: Any, status: int, code: str) -> str:
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    return str(answer.json()["detail"])


def test_a_waiting_job_is_cancelled_at_once_and_again_without_harm(client: TestClient, house: House) -> None:
    job, _ = house.store.create(spec())
    first = act(client, job, "cancel")
    assert (first.status_code, first.json()["state"], first.json()["reason"]) == (200, "cancelled", "cancelled_by_user")
    again = act(client, job, "cancel")
    assert (again.status_code, again.json()) == (200, first.json())


def test_an_active_job_is_cancelled_when_its_workers_have_gone(client: TestClient, house: House) -> None:
    job, _ = house.running_job()
    first = act(client, job, "cancel")
    assert (first.status_code, first.json()["state"], first.json()["stop_saves"]) == (202, "cancelling", False)
    assert act(client, job, "cancel").status_code == 200
    move(house, job, JobState.CANCELLED)
    assert act(client, job, "cancel").status_code == 200


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED])
def test_a_job_that_is_over_cannot_be_cancelled(client: TestClient, house: House, state: JobState) -> None:
    job, _ = house.running_job()
    move(house, job, state)
    assert state.value in refused(act(client, job, "cancel"), 409, "conflict")


def test_a_cancel_prevails_over_a_busy_scheduler(client: TestClient, house: House) -> None:
    job, _ = house.running_job()
    started = threading.Event()

    def keep_moving() -> None:
        while (seen := house.store.get(job.id)).state is not JobState.CANCELLING:
            started.set()
            try:
                if seen.state is JobState.RUNNING:
                    house.store.transition(seen, JobState.RECOVERING, reason=Reason.WORKER_LOST)
                elif seen.state is JobState.RECOVERING:
                    house.store.start_attempt(seen)
                else:
                    house.store.transition(seen, JobState.RUNNING, phase=Phase.TRAINING)
            except Conflict:
                continue

    with ThreadPoolExecutor(1) as pool:
        moving = pool.submit(keep_moving)
        assert started.wait(10)
        answer = act(client, job, "cancel")
        moving.result(timeout=30)
    assert (answer.status_code, answer.json()["state"]) == (202, "cancelling")


def test_a_cancel_may_let_the_job_save_first(client: TestClient, house: House) -> None:
    job, token = house.running_job()
    answer = act(client, job, "cancel", params={"checkpoint": "true"})
    assert (answer.status_code, answer.json()["state"], answer.json()["stop_saves"]) == (202, "cancelling", True)
    reply = house.store.ingest(attempt_id(job.id, 1), token, IngestBatch(batches=()))
    assert reply.control == "stop"


def test_a_cancel_that_does_not_save_forces_one_that_does(client: TestClient, house: House) -> None:
    job, token = house.running_job()
    saving = act(client, job, "cancel", params={"checkpoint": "true"}).json()
    forced = act(client, job, "cancel")
    assert (forced.status_code, forced.json()["state"], forced.json()["stop_saves"]) == (202, "cancelling", False)
    assert forced.json()["version"] == saving["version"] + 1
    assert house.store.ingest(attempt_id(job.id, 1), token, IngestBatch(batches=())).control == "abort"
    assert [event.type for event in house.store.events(job.id)][-2:] == ["state_changed", "cancel_forced"]
    for ask in ({}, {"checkpoint": "true"}):  # neither does more, nor takes it back
        again = act(client, job, "cancel", params=ask)
        assert (again.status_code, again.json()["version"]) == (200, forced.json()["version"])
    with pytest.raises(Conflict, match="only a cancellation that saves first"):
        house.store.force_cancel(house.store.get(job.id))


def test_to_save_first_means_something_to_a_cancellation_alone(client: TestClient, house: House) -> None:
    """Whatever a writer says of a move elsewhere, a job that is over is cancelled again without harm."""
    job, _ = house.running_job()
    for state in (JobState.CANCELLING, JobState.CANCELLED):
        job = house.store.transition(job, state, stop_saves=True)
        assert job.stop_saves is (state is JobState.CANCELLING)
    answer = act(client, job, "cancel")
    assert (answer.status_code, answer.json()["version"]) == (200, job.version)


def test_a_running_job_is_paused_and_resumed(client: TestClient, house: House) -> None:
    job, _ = house.running_job()
    assert [act(client, job, "pause").status_code for _ in range(2)] == [202, 200]
    assert ":resume it when it is paused" in refused(act(client, job, "resume"), 409, "conflict")
    move(house, job, JobState.PAUSED)
    assert act(client, job, "pause").status_code == 200
    first, again = act(client, job, "resume"), act(client, job, "resume", {})
    assert (first.status_code, again.status_code, again.json()["state"]) == (202, 200, "queued")
    assert first.headers["ETag"] == f'"{first.json()["version"]}"'


def test_a_waiting_job_is_paused_at_once(client: TestClient, house: House) -> None:
    job, _ = house.store.create(spec())
    answer = act(client, job, "pause")
    assert (answer.status_code, answer.json()["state"], answer.json()["reason"]) == (200, "paused", "paused_by_user")


def test_a_job_is_resumed_with_another_number_of_workers(client: TestClient, house: House) -> None:
    job, _ = house.store.create(spec(num_workers=2))  # of 32 images each
    act(client, job, "pause")
    for num_workers, message in ((3, "cannot share 64 images"), (8, "room for 4"), (0, "greater than or equal to 1")):
        answer = act(client, job, "resume", {"num_workers": num_workers})
        assert answer.status_code == 422
        assert [problem["pointer"] for problem in answer.json()["errors"]] == ["/num_workers"]
        assert message in answer.json()["errors"][0]["message"]
    resumed = act(client, job, "resume", {"num_workers": 4}).json()
    assert (resumed["state"], resumed["spec"]["num_workers"], resumed["spec"]["batch_size_per_worker"]) == (
        "queued",
        4,
        16,
    )
    assert act(client, job, "resume", {"num_workers": 4}).status_code == 200
    assert ":pause it" in refused(act(client, job, "resume", {"num_workers": 1}), 409, "conflict")


def test_a_checkpoint_is_asked_of_a_job_that_runs(client: TestClient, house: House) -> None:
    waiting, _ = house.store.create(spec())
    assert "ask when it runs" in refused(act(client, waiting, "checkpoint"), 409, "conflict")
    job, token = house.running_job()
    answers = [act(client, job, "checkpoint") for _ in range(2)]
    assert [(answer.status_code, answer.json()["checkpoint_requests"]) for answer in answers] == [(202, 1), (202, 2)]
    reply = house.store.ingest(attempt_id(job.id, 1), token, IngestBatch(batches=()))
    assert (reply.control, reply.checkpoint_requests) == ("continue", 2)
    assert house.store.events(job.id)[-1].type == "checkpoint_requested"


def test_a_verb_needs_no_body_and_says_what_is_wrong_with_one(client: TestClient, house: House) -> None:
    job, _ = house.store.create(spec())
    assert client.post(f"/v1/jobs/{job.id}:resume").status_code == 200
    refused(
        act(client, job, "resume", content=b"x", headers={"Content-Type": "text/plain"}), 415, "unsupported_media_type"
    )
    for verb, body in (("resume", {"workers": 2}), ("retry", {"from_checkpoint": "newest"})):
        answer = act(client, job, verb, body)
        assert [problem["pointer"] for problem in answer.json()["errors"]] == [f"/{next(iter(body))}"]
    for verb in ("cancel", "pause", "resume", "retry", "checkpoint"):
        refused(client.post(f"/v1/jobs/job_none:{verb}"), 404, "not_found")


def test_a_priority_is_changed_of_the_version_that_was_seen(client: TestClient, house: House) -> None:
    job, _ = house.store.create(spec())
    path = f"/v1/jobs/{job.id}"
    tag = client.get(path).headers["ETag"]
    assert tag == '"1"'
    changed = client.patch(path, json={"priority": 5}, headers={"If-Match": tag})
    assert (changed.status_code, changed.json()["spec"]["priority"], changed.headers["ETag"]) == (200, 5, '"2"')
    assert "version 2" in refused(
        client.patch(path, json={"priority": 6}, headers={"If-Match": tag}), 412, "precondition_failed"
    )
    for match, status in (('"1", "2"', 200), ("*", 200), ('W/"3"', 412), ("3", 422)):
        assert client.patch(path, json={"priority": 7}, headers={"If-Match": match}).status_code == status, match
    assert client.patch(path, json={"priority": 101}).status_code == 422
    assert client.patch(path, json={"name": "x"}).status_code == 422
    move(house, job, JobState.CANCELLED)
    refused(client.patch(path, json={"priority": 8}), 409, "conflict")
    assert house.store.get(job.id).spec.priority == 7


def test_a_failed_job_is_taken_up_again_from_its_newest_checkpoint(
    client: TestClient, house: House, tmp_path: Path
) -> None:
    paths = [tmp_path / f"step-{step}.pt" for step in (10, 20, 30)]
    for path in paths[1:]:
        path.touch()
    job, _ = house.running_job(*(saved(10 * n, path) for n, path in enumerate(paths, start=1)))
    assert ":cancel it first" in refused(act(client, job, "retry"), 409, "conflict")
    move(house, job, JobState.FAILED)
    answer = act(client, job, "retry")
    new = Job.model_validate_json(answer.content)
    assert (answer.status_code, answer.headers["Location"]) == (201, f"/v1/jobs/{new.id}")
    assert (new.spec, new.state, new.retry_of, new.attempt) == (job.spec, JobState.QUEUED, job.id, 0)
    assert house.store.get(job.id).state is JobState.FAILED
    starts = {
        wanted: act(client, job, "retry", {"from_checkpoint": wanted}).json()["start_checkpoint"]
        for wanted in (None, True, False, 20)
    }
    assert starts == {None: str(paths[2]), True: str(paths[2]), False: None, 20: str(paths[1])}
    missing = act(client, job, "retry", {"from_checkpoint": 10})
    assert [(p["pointer"], p["code"]) for p in missing.json()["errors"]] == [("/from_checkpoint", "checkpoint_missing")]
    assert "steps 20, 30" in missing.json()["errors"][0]["message"]
    move(house, new, JobState.CANCELLED)
    again = act(client, new, "retry", {"from_checkpoint": True}).json()
    assert (again["retry_of"], again["start_checkpoint"]) == (new.id, new.start_checkpoint)


def test_a_job_without_checkpoints_is_taken_up_from_the_beginning(client: TestClient, house: House) -> None:
    job, _ = house.running_job()
    move(house, job, JobState.FAILED)
    assert act(client, job, "retry").json()["start_checkpoint"] is None
    assert act(client, job, "retry", {"from_checkpoint": True}).status_code == 422


def test_a_job_that_succeeded_is_taken_up_from_the_beginning_unless_asked_otherwise(
    client: TestClient, house: House, tmp_path: Path
) -> None:
    path = tmp_path / "step-100.pt"
    path.touch()
    job, _ = house.running_job(saved(100, path))
    move(house, job, JobState.SUCCEEDED)
    assert act(client, job, "retry").json()["start_checkpoint"] is None
    assert act(client, job, "retry", {"from_checkpoint": True}).json()["start_checkpoint"] == str(path)


def test_a_retry_is_made_once_for_each_key(client: TestClient, house: House) -> None:
    job, _ = house.running_job()
    move(house, job, JobState.FAILED)
    key = {"Idempotency-Key": "again"}
    first, second = act(client, job, "retry", headers=key), act(client, job, "retry", headers=key)
    assert (first.status_code, second.status_code) == (201, 200)
    assert second.json() == first.json()
    assert second.headers["Idempotency-Replayed"] == "true"
    submitted = client.post(
        "/v1/jobs", content=job.spec.model_dump_json(), headers=key | {"Content-Type": "application/json"}
    )
    assert [problem["pointer"] for problem in submitted.json()["errors"]] == ["/Idempotency-Key"]


def test_a_retry_that_could_not_start_is_refused(client: TestClient, house: House) -> None:
    before, _ = house.store.create(spec())
    job, _ = house.store.create(spec().model_copy(update={"after": (before.id,)}))
    for cancelled in (before, job):
        move(house, cancelled, JobState.CANCELLED)
    assert before.id in refused(act(client, job, "retry"), 409, "conflict")


def test_a_quota_bounds_what_may_wait_and_how_many_workers_a_job_may_have(house: House) -> None:
    store = house.store
    store.principals.put(
        "mia", PrincipalTerms(role=Role.SUBMITTER, quota=Quota(max_running_workers=2, max_queued_jobs=2))
    )
    key = {"Authorization": f"Bearer {store.keys.make('mia').key}"}
    with house.client() as client:
        wanted = {"name": "digits", "max_steps": 5}
        jobs = [client.post("/v1/jobs", json=wanted, headers=key).json() for _ in range(2)]
        assert {job["owner"] for job in jobs} == {"mia"}
        assert "2 jobs of mia wait" in refused(
            client.post("/v1/jobs", json=wanted, headers=key), 429, "too_many_requests"
        )
        large = client.post("/v1/jobs", json=wanted | {"num_workers": 4}, headers=key)
        assert [(p["pointer"], p["code"]) for p in large.json()["errors"]] == [("/num_workers", "exceeds_quota")]
        client.post(f"/v1/jobs/{jobs[0]['id']}:cancel", headers=key)
        assert client.post(f"/v1/jobs/{jobs[0]['id']}:retry", headers=key).status_code == 201
        assert client.post(f"/v1/jobs/{jobs[0]['id']}:retry", headers=key).status_code == 429
