import pytest

from service.errors import InvalidRequest
from service.jobs import JobSpec, JobState
from service.store import JobStore
from tests.service.store.telling import spec


def test_a_job_knows_whose_it_is_and_what_it_takes_up(store: JobStore) -> None:
    first, _ = store.create(JobSpec(name="first", priority=7, epochs=1), owner="anna")
    again, _ = store.create(first.spec, owner="anna", retry_of=first.id, start_checkpoint="/storage/step-3.pt")
    assert (first.owner, first.spec.priority, first.retry_of, first.start_checkpoint) == ("anna", 7, None, None)
    assert (again.owner, again.retry_of, again.start_checkpoint) == ("anna", first.id, "/storage/step-3.pt")
    assert store.get(again.id) == again
    assert store.create(spec())[0].owner == "anonymous"


def test_each_owner_has_keys_of_its_own(store: JobStore) -> None:
    annas, _ = store.create(spec(), "key", owner="anna")
    berts, created = store.create(spec(max_steps=7), "key", owner="bert")
    assert created
    assert store.create(spec(), "key", owner="anna") == (annas, False)
    assert store.recall(spec(max_steps=7), "key", owner="bert") == berts
    assert store.recall(spec(), "key") is None
    with pytest.raises(InvalidRequest, match="used before for another spec"):
        store.recall(spec(), "key", owner="bert")


def test_a_job_comes_only_after_jobs_that_its_owner_has(store: JobStore) -> None:
    own, _ = store.create(spec(), owner="anna")
    ended = store.transition(store.create(spec(), owner="anna")[0], JobState.CANCELLED)
    others, _ = store.create(spec(), owner="bert")
    nobodys = "job_" + "0" * 26
    after, _ = store.create(JobSpec(name="t", epochs=1, after=(own.id, ended.id)), owner="anna")
    assert after.spec.after == (own.id, ended.id)
    for wrong in (others.id, nobodys):
        with pytest.raises(InvalidRequest, match=wrong) as caught:
            store.create(JobSpec(name="t", epochs=1, after=(own.id, wrong)), "key", owner="anna")
        assert [(problem.pointer, problem.code) for problem in caught.value.problems] == [("/after", "job_unknown")]
    assert store.create(spec(), "key", owner="anna")[1]  # what was refused has not used up the key
    assert len(store.list_jobs(owner="anna").items) == 4
