import pytest

from service.errors import InvalidRequest, NotFound
from service.jobs import ADMIN, ANONYMOUS, Principal, PrincipalTerms, Quota, Role
from service.store import JobStore

TERMS = PrincipalTerms(role=Role.SUBMITTER, quota=Quota(max_running_workers=4))


def test_a_principal_is_made_once_and_then_changed(store: JobStore) -> None:
    alice, created = store.principals.put("alice", TERMS)
    assert (alice, created) == (Principal(name="alice", role=Role.SUBMITTER, quota=TERMS.quota), True)
    demoted, created = store.principals.put("alice", PrincipalTerms(role=Role.READER))
    assert (demoted, created) == (Principal(name="alice", role=Role.READER), False)
    assert store.principals.get("alice") == demoted
    assert store.principals.quota_of("alice") == Quota()


def test_the_operator_and_whoever_shows_no_key_are_admins_whatever_is_asked(store: JobStore) -> None:
    for name in (ADMIN, ANONYMOUS):
        assert store.principals.get(name) == Principal(name=name, role=Role.ADMIN)
        with pytest.raises(InvalidRequest) as refused:
            store.principals.put(name, PrincipalTerms(role=Role.READER))
        assert [problem.pointer for problem in refused.value.problems] == ["/role"]
        quota = Quota(max_queued_jobs=3)
        store.principals.put(name, PrincipalTerms(role=Role.ADMIN, quota=quota))
        assert store.principals.quota_of(name) == quota


def test_a_principal_that_is_not_there_is_not_found_and_not_limited(store: JobStore) -> None:
    with pytest.raises(NotFound, match="nobody"):
        store.principals.get("nobody")
    assert store.principals.quota_of("nobody") == Quota()


def test_pages_of_principals_follow_one_another_by_name(store: JobStore) -> None:
    names = ["bob", "alice", "carol", "dave", "eve"]
    for name in names:
        store.principals.put(name, TERMS)
    found: list[str] = []
    while page := store.principals.page(limit=2, after=found[-1] if found else ""):
        found += [principal.name for principal in page]
    assert found == sorted(names)
