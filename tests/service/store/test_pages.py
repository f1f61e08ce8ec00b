import base64
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import InvalidRequest
from service.jobs import Job, JobState
from service.store import JobStore
from tests.service.store.clock import Clock
from tests.service.store.telling import spec


def _all_pages(store: JobStore, limit: int, states: set[JobState] | None = None, name: str | None = None) -> list[Job]:
    found: list[Job] = []
    cursor = None
    while True:
        page = store.list_jobs(limit, cursor, states=states, name=name)
        assert len(page.items) <= limit
        found += page.items
        if page.next_cursor is None:
            return found
        assert len(page.items) == limit
        assert page.next_cursor != cursor
        cursor = page.next_cursor


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pauses=st.lists(st.sampled_from([0, 1]), max_size=8), limit=st.integers(1, 4))
def test_pages_tell_each_job_once_newest_first(store: JobStore, clock: Clock, pauses: list[int], limit: int) -> None:
    for pause in pauses:
        clock.advance(pause)  # jobs of the same instant are told apart by their ids
        store.create(spec())
    found = _all_pages(store, limit)
    assert found == sorted(found, key=lambda job: (job.created_at, job.id), reverse=True)
    assert len({job.id for job in found}) == len(found)
    assert {job.id for job in found} == {job.id for job in store.unfinished()}


def test_a_new_job_does_not_shift_the_next_page(store: JobStore, clock: Clock) -> None:
    for index in range(4):
        clock.advance(1)
        store.create(spec(f"job {index}"))
    first = store.list_jobs(2)
    clock.advance(1)
    store.create(spec("job 4"))
    second = store.list_jobs(2, first.next_cursor)
    assert [job.spec.name for job in (*first.items, *second.items)] == ["job 3", "job 2", "job 1", "job 0"]
    assert second.next_cursor is None


def test_pages_are_filtered_by_state_and_name(store: JobStore, clock: Clock) -> None:
    for index in range(6):
        clock.advance(1)
        job, _ = store.create(spec("even" if index % 2 == 0 else "odd"))
        if index < 3:
            store.transition(job, JobState.CANCELLED)
    assert len(_all_pages(store, 2, states={JobState.CANCELLED})) == 3
    assert len(_all_pages(store, 2, states={JobState.CANCELLED, JobState.QUEUED})) == 6
    assert len(_all_pages(store, 2, states={JobState.CANCELLED}, name="odd")) == 1
    assert _all_pages(store, 2, states=set()) == []
    assert _all_pages(store, 2, name="ev") == []


def _refusal(store: JobStore, cursor: str, **filters: Any) -> str:
    with pytest.raises(InvalidRequest, match="/cursor") as refused:
        store.list_jobs(2, cursor, **filters)
    return refused.value.problems[0].code


def test_pages_are_filtered_by_owner_and_time(store: JobStore, clock: Clock) -> None:
    times = []
    for index in range(6):
        clock.advance(1)
        times.append(clock.now)
        store.create(spec(f"job {index}"), owner="anna" if index % 2 else "bert")

    def names(**wanted: Any) -> list[str]:
        return [job.spec.name for job in store.list_jobs(**wanted).items]

    assert names(owner="anna") == ["job 5", "job 3", "job 1"]
    assert names(owner="nobody") == []
    assert names(created_after=times[1], created_before=times[4]) == ["job 3", "job 2", "job 1"]
    assert names(created_before=times[2]) == ["job 1", "job 0"]
    assert names(created_after=times[2]) + names(created_before=times[2]) == names()  # spans follow each other
    assert names(owner="bert", created_after=times[2], limit=1) == ["job 4"]
    first = store.list_jobs(1, owner="bert", created_after=times[2])
    second = store.list_jobs(1, first.next_cursor, owner="bert", created_after=times[2])
    assert [job.spec.name for job in second.items] == ["job 2"]
    assert second.next_cursor is None


@pytest.mark.parametrize("cursor", ["", "x", "é", "=", base64.urlsafe_b64encode(b"tomorrow job_1" * 3).decode()])
def test_a_cursor_that_was_not_made_here_is_refused(store: JobStore, cursor: str) -> None:
    assert _refusal(store, cursor) == "cursor_invalid"


def test_a_cursor_belongs_to_the_filters_it_was_made_with(store: JobStore, clock: Clock) -> None:
    for _ in range(4):
        clock.advance(1)
        store.create(spec("same"))
    cursor = store.list_jobs(2, name="same").next_cursor
    assert cursor is not None
    assert len(store.list_jobs(1, cursor, name="same").items) == 1  # another length of page is the same list
    assert _refusal(store, cursor) == "cursor_of_other_filters"
    assert _refusal(store, cursor, name="same", owner="anonymous") == "cursor_of_other_filters"


def test_a_changed_cursor_is_refused_wherever_it_was_changed(store: JobStore) -> None:
    for _ in range(3):
        store.create(spec())
    cursor = store.list_jobs(2).next_cursor
    assert cursor is not None
    raw = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
    for place in range(len(raw)):
        changed = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
        assert _refusal(store, base64.urlsafe_b64encode(changed).decode()) == "cursor_invalid"
