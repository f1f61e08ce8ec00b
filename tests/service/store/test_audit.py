from datetime import timedelta
from itertools import pairwise

import pytest
from sqlalchemy import delete, update
from sqlalchemy.exc import DBAPIError

from service.errors import InvalidRequest
from service.jobs import AuditEntry
from service.store import JobStore
from service.store.schema import audit
from tests.service.store.clock import Clock


def entry(number: int, principal: str | None = "alice") -> AuditEntry:
    return AuditEntry(
        principal=principal,
        key_id="key_1",
        address="192.0.2.7",
        action="POST /v1/jobs",
        target=f"/v1/jobs/{number}",
        status=201,
        request_id=f"{number:016x}",
    )


def test_entries_come_back_as_they_were_newest_first(store: JobStore, clock: Clock) -> None:
    for number in range(3):
        store.audit.append(entry(number))
        clock.advance(1)
    found = store.audit.page().items
    assert [AuditEntry.model_validate(record.model_dump()) for record in found] == [entry(n) for n in (2, 1, 0)]
    steps = [(newer.seq - older.seq, newer.time - older.time) for newer, older in pairwise(found)]
    assert steps == [(1, timedelta(seconds=1))] * 2


def test_pages_hold_each_entry_once_also_while_more_come(store: JobStore) -> None:
    for number in range(5):
        store.audit.append(entry(number))
    first = store.audit.page(limit=2)
    store.audit.append(entry(5))
    second = store.audit.page(limit=2, cursor=first.next_cursor)
    third = store.audit.page(limit=2, cursor=second.next_cursor)
    told = [record.target for page in (first, second, third) for record in page.items]
    assert told == [f"/v1/jobs/{number}" for number in (4, 3, 2, 1, 0)]
    assert third.next_cursor is None


def test_one_principals_entries_can_be_told_alone(store: JobStore) -> None:
    for number, principal in enumerate(("alice", "bob", None, "alice")):
        store.audit.append(entry(number, principal))
    assert [record.target for record in store.audit.page(principal="alice").items] == ["/v1/jobs/3", "/v1/jobs/0"]


@pytest.mark.parametrize("cursor", ["", "x", "-1", "1.5", "9" * 40, "\u0661"])
def test_a_cursor_that_is_none_is_refused(store: JobStore, cursor: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        store.audit.page(cursor=cursor)
    assert [problem.pointer for problem in refused.value.problems] == ["/cursor"]


def test_the_database_itself_refuses_to_change_or_remove_an_entry(store: JobStore) -> None:
    store.audit.append(entry(0))
    before = store.audit.page()
    for change in (update(audit).values(status=200), delete(audit)):
        with pytest.raises(DBAPIError, match="only added to"), store._database.write() as connection:
            connection.execute(change)
    assert store.audit.page() == before


def test_old_entries_go_and_the_trail_says_so_itself(store: JobStore, clock: Clock) -> None:
    for number in range(5):
        store.audit.append(entry(number))
        clock.advance(86_400)
    clock.advance(7 * 86_400)
    assert store.audit.trim(days=30) == 0
    assert len(store.audit.page().items) == 5
    assert store.audit.trim(days=9, interrupted=lambda: True) == 0
    assert store.audit.trim(days=9) == 3
    said, *kept = store.audit.page().items
    assert [record.target for record in kept if record.action != "audit trim"] == ["/v1/jobs/4", "/v1/jobs/3"]
    assert (said.action, said.address, said.detail.partition(":")[0]) == (
        "audit trim",
        "local",
        "3 entries of before 2026-01-05T03",
    )
    with pytest.raises(DBAPIError, match="only added to"), store._database.write() as connection:
        connection.execute(delete(audit))
    with pytest.raises(ValueError, match="at least 0"):
        store.audit.trim(days=-1)


def test_an_entry_holds_no_key_and_no_more_text_than_it_should(store: JobStore) -> None:
    key = f"syncbn_{'0a' * 32}"
    told = {"target": f"/v1/jobs/{key}", "detail": key * 1000, "action": "POST " + "x" * 10_000}
    store.audit.append(entry(0).model_copy(update=told))
    (found,) = store.audit.page().items
    assert found.target == "/v1/jobs/syncbn_[redacted]"
    assert key not in found.model_dump_json()
    assert (len(found.action), len(found.detail)) == (500, 10_000)
