import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from service.errors import NotFound, TooManyRequests
from service.jobs import (
    DriftMetric,
    JobState,
    LimitAction,
    LimitExceeded,
    PrincipalTerms,
    Role,
    Topic,
    Webhook,
    WebhookDelivery,
    WebhookOrder,
    WebhookState,
    attempt_id,
)
from service.store import JobStore, LeaseLost, Pending
from service.store.webhooks import DELIVERIES_KEPT, MAX_OF_OWNER
from tests.service.store.clock import Clock
from tests.service.store.conftest import OpenStore
from tests.service.store.telling import batch, evaluation, spec


def order(*events: Topic, everyones: bool = False) -> WebhookOrder:
    fields = {"url": "https://ci.example/hook", "events": events or (Topic.EVERYTHING,), "secret": "ci"}
    return WebhookOrder.model_validate(fields | {"all": everyones})


def delivery(clock: Clock, told: Pending | None = None, error: str | None = None) -> WebhookDelivery:
    of = {} if told is None else {"job_id": told.job_id, "seq": told.event.seq}
    return WebhookDelivery(
        time=clock.now, event="test" if told is None else told.event.type, error=error, duration_s=0.5, **of
    )


def tell_all(store: JobStore, hook: Webhook, clock: Clock) -> list[tuple[str, int]]:
    """Job and number of every event that the webhook is told, one after the other."""
    told = []
    while (pending := store.webhooks.pending(hook.id)) is not None:
        told.append((pending.job_id, pending.event.seq))
        store.webhooks.succeeded(pending, delivery(clock, pending))
    return told


def test_a_webhook_is_made_listed_and_removed_with_all_that_waits(store: JobStore, clock: Clock) -> None:
    alices, bobs = store.webhooks.make(order(Topic.DRIFT), "alice"), store.webhooks.make(order(), "bob")
    assert alices == store.webhooks.get(alices.id)
    assert (alices.events, alices.state) == ((Topic.STATE_CHANGED, Topic.DRIFT), WebhookState.ACTIVE)
    assert store.webhooks.page() == [alices, bobs]
    assert store.webhooks.page(after=alices.id) == [bobs]
    assert store.webhooks.page(owner="alice") == [alices]
    store.create(spec(), owner="alice")
    assert store.webhooks.due() == [alices.id]
    pending = store.webhooks.pending(alices.id)
    assert pending is not None
    store.webhooks.record_test(alices.id, delivery(clock))
    store.webhooks.remove(alices.id)
    assert store.webhooks.due() == []
    store.webhooks.succeeded(pending, delivery(clock, pending))  # it was on its way: nothing to remember it by
    for ask in (store.webhooks.get, store.webhooks.deliveries, store.webhooks.remove):
        with pytest.raises(NotFound, match=alices.id):
            ask(alices.id)


def test_a_principal_has_a_bounded_number_of_webhooks(store: JobStore) -> None:
    for _ in range(MAX_OF_OWNER):
        store.webhooks.make(order(), "alice")
    with pytest.raises(TooManyRequests, match="alice has 20 webhooks"):
        store.webhooks.make(order(), "alice")
    store.webhooks.make(order(), "bob")


def test_a_webhook_is_told_what_it_wants_of_what_happens_after_its_making(store: JobStore, clock: Clock) -> None:
    job, token = store.start_attempt(store.create(spec())[0])
    some = store.webhooks.make(order(Topic.CHECKPOINT_REQUESTED), "anonymous")
    everything = store.webhooks.make(order(), "anonymous")
    of_another = store.webhooks.make(order(), "alice")
    store.ingest(attempt_id(job.id, 1), token, batch([evaluation(1)]))
    store.request_checkpoint(job.id)
    store.ingest(attempt_id(job.id, 1), token, batch([evaluation(2)], first_seq=1))
    store.transition(store.get(job.id), JobState.FAILED)
    kinds = {event.seq: event.type for event in store.events(job.id)}
    assert [kinds[seq] for _, seq in tell_all(store, some, clock)] == ["checkpoint_requested", "state_changed"]
    assert tell_all(store, everything, clock) == [(job.id, seq) for seq in (3, 4, 5, 6)]
    assert tell_all(store, of_another, clock) == []
    assert store.webhooks.due() == []


def test_a_limit_that_only_reports_is_told_to_nobody(store: JobStore, clock: Clock) -> None:
    hooks = [store.webhooks.make(order(topic), "alice") for topic in (Topic.LIMIT_EXCEEDED, Topic.EVERYTHING)]
    job = store.create(spec(), owner="alice")[0]
    job, token = store.start_attempt(job)
    for hook in hooks:
        tell_all(store, hook, clock)
    first = len(store.events(job.id)) + 1
    actions = [LimitAction.REPORT, *LimitAction, LimitAction.REPORT]
    name = '"action":"report"'  # which JSON escapes
    common = {"limit": 0, "layer": name, "metric": DriftMetric.OUTPUT_ERROR, "value": 1.0, "above": 0.5}
    facts = [LimitExceeded(step=10, action=action, **common) for action in actions]
    store.ingest(attempt_id(job.id, 1), token, batch(facts))
    told = [(job.id, first + i) for i, action in enumerate(actions) if action is not LimitAction.REPORT]
    assert len(told) == 3
    assert [tell_all(store, hook, clock) for hook in hooks] == [told, told]
    assert len(store.events(job.id, after_seq=first - 1)) == len(actions)


def test_everyones_jobs_are_told_only_while_the_owner_is_an_admin(store: JobStore, clock: Clock) -> None:
    store.principals.put("carol", PrincipalTerms(role=Role.ADMIN))
    hook = store.webhooks.make(order(everyones=True), "carol")
    jobs = [store.create(spec(), owner=owner)[0].id for owner in ("alice", "carol")]
    assert sorted(tell_all(store, hook, clock)) == sorted((job, 1) for job in jobs)
    store.principals.put("carol", PrincipalTerms(role=Role.SUBMITTER))
    jobs = [store.create(spec(), owner=owner)[0].id for owner in ("alice", "carol")]
    assert tell_all(store, hook, clock) == [(jobs[1], 1)]


def test_what_failed_waits_and_its_job_with_it(store: JobStore, clock: Clock) -> None:
    hook = store.webhooks.make(order(), "anonymous")
    job, _ = store.create(spec())
    first = store.webhooks.pending(hook.id)
    assert first is not None
    store.webhooks.failed(first, delivery(clock, first, "answered 500"), clock.now + timedelta(seconds=5))
    store.request_checkpoint(store.start_attempt(job)[0].id)
    assert (store.webhooks.due(), store.webhooks.pending(hook.id)) == ([], None)
    began = clock.now
    clock.advance(5)
    again = store.webhooks.pending(hook.id)
    assert again is not None
    assert (again.event.seq, again.num_failures, again.failing_since) == (1, 1, began)
    store.webhooks.succeeded(again, delivery(clock, again))
    later = store.webhooks.pending(hook.id)
    assert later is not None
    assert (later.event.seq, later.num_failures, later.failing_since) == (2, 0, None)
    told = store.webhooks.deliveries(hook.id)
    assert [(each.seq, each.error) for each in told] == [(1, None), (1, "answered 500")]
    store.webhooks.failed(later, delivery(clock, later, "away"), clock.now + timedelta(hours=1))
    store.webhooks.record_test(hook.id, delivery(clock, error="still away"))
    assert store.webhooks.due() == []
    store.webhooks.record_test(hook.id, delivery(clock))
    assert store.webhooks.due() == [hook.id]  # the receiver is back: what waits need not


def test_a_webhook_that_is_given_up_is_told_nothing_until_a_test_succeeds(store: JobStore, clock: Clock) -> None:
    hook = store.webhooks.make(order(), "anonymous")
    store.create(spec())
    pending = store.webhooks.pending(hook.id)
    assert pending is not None
    store.webhooks.failed(pending, delivery(clock, pending, "away"), None)
    assert store.webhooks.get(hook.id).state is WebhookState.FAILING
    store.create(spec())
    assert (store.webhooks.due(), store.webhooks.pending(hook.id)) == ([], None)
    assert store.webhooks.record_test(hook.id, delivery(clock, error="away")).state is WebhookState.FAILING
    assert store.webhooks.record_test(hook.id, delivery(clock)).state is WebhookState.ACTIVE
    assert store.webhooks.due() == []
    job, _ = store.create(spec())
    assert tell_all(store, hook, clock) == [(job.id, 1)]


def test_only_the_last_tries_are_kept(store: JobStore, clock: Clock) -> None:
    hook = store.webhooks.make(order(), "anonymous")
    for number in range(DELIVERIES_KEPT + 5):
        store.webhooks.record_test(hook.id, delivery(clock, error=str(number)))
    kept = [each.error for each in store.webhooks.deliveries(hook.id)]
    assert kept == [str(number) for number in range(DELIVERIES_KEPT + 4, 4, -1)]
    assert [each.error for each in store.webhooks.deliveries(hook.id, limit=2)] == kept[:2]


def test_whoever_lost_the_lease_settles_nothing(store: JobStore, clock: Clock) -> None:
    late = store.acquire_lease("webhooks", "late", 10.0)
    hook = store.webhooks.make(order(), "anonymous")
    job, _ = store.create(spec())
    clock.advance(10)
    assert store.acquire_lease("webhooks", "current", 10.0) is not None
    pending = store.webhooks.pending(hook.id)
    assert pending is not None
    with pytest.raises(LeaseLost):
        store.webhooks.succeeded(pending, delivery(clock, pending), late)
    with pytest.raises(LeaseLost):
        store.webhooks.failed(pending, delivery(clock, pending), None, late)
    with pytest.raises(LeaseLost):
        store.webhooks.sweep(late)
    assert store.webhooks.deliveries(hook.id) == []
    assert tell_all(store, hook, clock) == [(job.id, 1)]


def test_no_event_is_missed_while_it_is_told_as_another_happens(open_store: OpenStore, clock: Clock) -> None:
    """One thread ends the lane again and again as another makes it longer, and a third removes webhooks."""
    teller, hearer, remover = open_store(), open_store(), open_store()
    hook = teller.webhooks.make(order(), "anonymous")
    job, token = teller.start_attempt(teller.create(spec())[0])
    done = threading.Event()

    def tell() -> None:
        for number in range(30):
            teller.ingest(attempt_id(job.id, 1), token, batch([evaluation(number)], first_seq=number))
        done.set()

    def come_and_go() -> None:
        while not done.is_set():
            remover.webhooks.remove(remover.webhooks.make(order(), "anonymous").id)
            remover.webhooks.sweep()

    with ThreadPoolExecutor(2) as pool:
        telling, going = pool.submit(tell), pool.submit(come_and_go)
        heard: list[tuple[str, int]] = []
        while not telling.done():
            heard += tell_all(hearer, hook, clock)
        telling.result()
        going.result()
    heard += tell_all(hearer, hook, clock)
    assert heard == [(job.id, seq) for seq in range(1, 33)]
    remover.webhooks.sweep()
    assert teller.webhooks.due() == []
