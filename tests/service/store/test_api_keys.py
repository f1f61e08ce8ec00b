import hashlib
import re
from datetime import timedelta

import pytest

from service.errors import Conflict, InvalidRequest, NotFound, Unauthorized
from service.jobs import ANONYMOUS, PrincipalTerms, Role
from service.store import JobStore
from service.store.api_keys import USE_TOLD_EVERY, redacted
from tests.service.store.clock import Clock
from tests.service.store.conftest import OpenStore


@pytest.fixture
def alice(store: JobStore) -> str:
    store.principals.put("alice", PrincipalTerms(role=Role.SUBMITTER))
    return "alice"


def test_a_key_is_256_random_bits_that_are_kept_as_their_sha256_alone(store: JobStore, alice: str) -> None:
    keys = [store.keys.make(alice).key for _ in range(3)]
    assert all(re.fullmatch("syncbn_[0-9a-f]{64}", key) for key in keys)
    assert len(set(keys)) == 3
    with store._database.read() as connection:
        rows = connection.exec_driver_sql("SELECT * FROM api_keys").fetchall()
    stored = [str(value) for row in rows for value in row]
    for key in keys:
        assert hashlib.sha256(key.encode()).hexdigest() in stored
        assert not [value for value in stored if key.removeprefix("syncbn_") in value]


def test_a_key_tells_its_principal_with_the_role_of_this_moment(store: JobStore, alice: str) -> None:
    made = store.keys.make(alice)
    caller = store.keys.identify(made.key)
    assert caller.principal.role is Role.SUBMITTER
    assert caller.key is not None
    assert caller.key.id == made.id
    store.principals.put(alice, PrincipalTerms(role=Role.READER))
    assert store.keys.identify(made.key).principal.role is Role.READER


@pytest.mark.parametrize(
    "wrong", ["", "syncbn_", "syncbn_" + "0" * 64, "syncbn_" + "0" * 63 + "Z", "\udcff", "' OR 1=1 --", "x" * 10_000]
)
def test_what_is_no_key_opens_nothing(store: JobStore, alice: str, wrong: str) -> None:
    store.keys.make(alice)
    with pytest.raises(Unauthorized, match="no key of this service"):
        store.keys.identify(wrong)


def test_a_key_ends_when_it_expires_or_is_revoked_and_says_so(store: JobStore, clock: Clock, alice: str) -> None:
    short, revoked = store.keys.make(alice, timedelta(hours=1)), store.keys.make(alice)
    clock.advance(3599)
    store.keys.identify(short.key)
    clock.advance(1)
    with pytest.raises(Unauthorized, match="expired"):
        store.keys.identify(short.key)
    first = store.keys.revoke(revoked.id)
    clock.advance(60)
    assert store.keys.revoke(revoked.id) == first
    with pytest.raises(Unauthorized, match="revoked"):
        store.keys.identify(revoked.key)


def test_a_replaced_key_stays_good_for_the_grace_and_the_new_one_as_long_as_the_old(
    store: JobStore, clock: Clock, alice: str
) -> None:
    old = store.keys.make(alice, timedelta(days=30))
    clock.advance(86400)
    new = store.keys.rotate(old.id, grace=timedelta(hours=1))
    assert new.expires_at == new.created_at + timedelta(days=30)
    assert store.keys.identify(new.key).principal == store.keys.identify(old.key).principal
    clock.advance(3600)
    store.keys.identify(new.key)
    with pytest.raises(Unauthorized, match="expired"):
        store.keys.identify(old.key)
    with pytest.raises(Conflict, match="expired"):
        store.keys.rotate(old.id)


def test_a_key_replaced_without_grace_ends_at_once(store: JobStore, alice: str) -> None:
    old = store.keys.make(alice)
    new = store.keys.rotate(old.id)
    assert new.expires_at is None
    with pytest.raises(Unauthorized, match="revoked"):
        store.keys.identify(old.key)
    with pytest.raises(Conflict, match="revoked"):
        store.keys.rotate(old.id)


def test_a_grace_never_makes_a_key_live_longer(store: JobStore, clock: Clock, alice: str) -> None:
    old = store.keys.make(alice, timedelta(hours=1))
    store.keys.rotate(old.id, grace=timedelta(days=1))
    assert store.keys.get(old.id).expires_at == old.expires_at


def test_the_last_use_is_told_coarsely(store: JobStore, clock: Clock, alice: str) -> None:
    made = store.keys.make(alice)
    assert store.keys.get(made.id).last_used_at is None
    store.keys.identify(made.key)
    first = store.keys.get(made.id).last_used_at
    assert first is not None
    clock.advance(USE_TOLD_EVERY.total_seconds() - 1)
    store.keys.identify(made.key)
    assert store.keys.get(made.id).last_used_at == first
    clock.advance(1)
    store.keys.identify(made.key)
    assert store.keys.get(made.id).last_used_at == first + USE_TOLD_EVERY


def test_keys_are_made_for_principals_that_can_have_them(store: JobStore) -> None:
    for name in ("nobody", ANONYMOUS):
        with pytest.raises(InvalidRequest) as refused:
            store.keys.make(name)
        assert [problem.pointer for problem in refused.value.problems] == ["/principal"]
    with pytest.raises(NotFound):
        store.keys.revoke("key_none")


def test_whether_a_key_was_ever_made_is_never_forgotten(store: JobStore, alice: str) -> None:
    assert not store.keys.any_made()
    store.keys.revoke(store.keys.make(alice).id)
    assert store.keys.any_made()


def test_pages_of_keys_hold_each_once_and_no_secret(store: JobStore, alice: str) -> None:
    store.principals.put("bob", PrincipalTerms(role=Role.READER))
    made = [store.keys.make(name) for name in (alice, "bob", alice, "bob", alice)]
    found = list(store.keys.page(limit=3))
    found += store.keys.page(limit=3, after=found[-1].id)
    assert {key.id for key in found} == {key.id for key in made}
    assert len(found) == 5
    assert {key.id for key in store.keys.page(principal="bob")} == {made[1].id, made[3].id}
    assert not [key for key in made if key.key in repr(found) or key.key in repr(made)]


def test_a_key_that_one_service_revokes_opens_nothing_at_another(open_store: OpenStore) -> None:
    here, there = open_store(), open_store()
    here.principals.put("alice", PrincipalTerms(role=Role.READER))
    made = here.keys.make("alice")
    there.keys.identify(made.key)
    here.keys.revoke(made.id)
    with pytest.raises(Unauthorized, match="revoked"):
        there.keys.identify(made.key)


def test_a_key_within_a_text_is_redacted() -> None:
    assert redacted(f"before syncbn_{'0a' * 32} after") == "before syncbn_[redacted] after"
