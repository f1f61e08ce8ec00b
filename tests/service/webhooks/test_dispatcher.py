"""Whole deliveries: a real store, a real receiver, and dispatchers that come and go."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from service.jobs import Job, JobState, TelemetryEvent, Topic, Webhook, WebhookOrder, WebhookState, attempt_id
from service.store import JobStore
from service.webhooks import AddressGuard, Dispatcher, SecretFiles, Sender
from service.webhooks.backoff import Backoff
from service.webhooks.signing import signature
from tests.service.cluster.waiting import wait_until
from tests.service.store.telling import batch, evaluation, spec, step
from tests.service.webhooks.conftest import SECRET
from tests.service.webhooks.receiving import Receiver

ROOT = Path(__file__).parents[3]
SOON = Backoff(first_s=0.05, longest_s=0.2, rest_s=0.05)


@dataclass
class Office:
    """A store, and as many dispatchers over it as a test starts."""

    path: Path
    secrets: Path
    receiver: Receiver
    store: JobStore = field(init=False)

    def __post_init__(self) -> None:
        self.store = JobStore.open(self.path)

    def hook(self, path: str, *events: Topic) -> Webhook:
        url = f"http://127.0.0.1:{self.receiver.port}{path}"
        order = WebhookOrder.model_validate({"url": url, "events": events or (Topic.EVERYTHING,), "secret": "good"})
        return self.store.webhooks.make(order, "anonymous")

    def running_job(self) -> tuple[Job, str]:
        job, token = self.store.start_attempt(self.store.create(spec())[0])
        return self.store.transition(job, JobState.RUNNING), token

    @contextmanager
    def dispatching(self, backoff: Backoff = SOON, timeout_s: float = 20.0) -> Iterator[None]:
        """A dispatcher, as another service would run one, until the block's end."""
        store = JobStore.open(self.path)
        sender = Sender(AddressGuard([ip_network("127.0.0.0/8")]), SecretFiles(self.secrets), timeout_s=timeout_s)
        dispatcher = Dispatcher(store, sender, backoff=backoff, poll_s=0.02)
        stopping = threading.Event()
        thread = threading.Thread(target=dispatcher.run, args=(stopping,))
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join(20)
            store.close()
        assert not thread.is_alive()

    def nothing_waits(self) -> bool:
        with self.store._database.read() as connection:
            return connection.exec_driver_sql("SELECT 1 FROM webhook_lanes").first() is None


@pytest.fixture
def office(tmp_path: Path, secrets: Path, receiver: Receiver) -> Iterator[Office]:
    opened = Office(tmp_path / "jobs.sqlite", secrets, receiver)
    yield opened
    opened.store.close()


def told(receiver: Receiver, path: str) -> list[tuple[str, int]]:
    """Job and number of each event that was told, each once, in the order of its first telling."""
    bodies = [json.loads(post.body) for post in receiver.at(path)]
    return list(dict.fromkeys((body["job_id"], body["seq"]) for body in bodies))


def test_each_event_is_told_in_order_with_its_job(office: Office) -> None:
    office.store.create(spec("before"))
    office.hook("/all")
    office.hook("/some", Topic.EVALUATION)
    with office.dispatching():
        job, token = office.running_job()
        facts: list[TelemetryEvent] = [evaluation(1), step(1), evaluation(2)]
        office.store.ingest(attempt_id(job.id, 1), token, batch(facts))
        office.store.request_checkpoint(job.id)
        office.store.transition(job, JobState.FAILED, detail="why")
        everything = [json.loads(post.body) for post in office.receiver.wait_for(7, "/all")]
        office.receiver.wait_for(6, "/some")
        wait_until(office.nothing_waits, 20, "all is told")
    events = office.store.events(job.id)
    assert [body["seq"] for body in everything] == [event.seq for event in events] == [1, 2, 3, 4, 5, 6, 7]
    for body, event in zip(everything, events, strict=True):
        assert (body["id"], body["type"], body["job_id"]) == (f"{job.id}.{event.seq}", event.type, job.id)
        assert body["body"] == json.loads(event.model_dump_json())["body"]
    assert everything[-1]["job"] == {"name": "digits", "state": "failed", "owner": "anonymous"}
    wanted = [event.seq for event in events if event.type in ("state_changed", "evaluation")]
    assert [seq for _, seq in told(office.receiver, "/some")] == wanted
    assert all(post.headers["Syncbn-Event"] == json.loads(post.body)["type"] for post in office.receiver.posts)


def test_the_documented_check_knows_a_real_delivery_from_a_forged_one(office: Office) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "service.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "is_genuine" in block]
    documented: dict[str, Any] = {}
    exec(code, documented)
    is_genuine: Callable[[bytes, dict[str, str], bytes], bool] = documented["is_genuine"]
    office.hook("/ok")
    with office.dispatching():
        office.store.create(spec())
        (post,) = office.receiver.wait_for(1, "/ok")
    assert is_genuine(SECRET, post.headers, post.body)
    assert not is_genuine(SECRET + b".", post.headers, post.body)
    assert not is_genuine(SECRET, post.headers, post.body + b" ")
    sent_at = int(post.headers["Syncbn-Timestamp"])
    assert not is_genuine(SECRET, post.headers | {"Syncbn-Timestamp": str(sent_at + 1)}, post.body)
    late = {"Syncbn-Timestamp": str(sent_at - 3600)}
    late["Syncbn-Signature"] = signature(SecretStr(SECRET.decode()), late["Syncbn-Timestamp"], post.body)
    assert not is_genuine(SECRET, post.headers | late, post.body)


def test_no_restart_loses_an_event_or_changes_the_name_of_its_delivery(office: Office) -> None:
    """Dispatchers come and go while jobs tell, and while the receiver is away; each event arrives in order."""
    hook = office.hook("/ok")
    job, token = office.running_job()
    for round_ in range(4):
        office.receiver.fails = {"/ok"} if round_ % 2 else set()
        before = len(office.receiver.posts)
        with office.dispatching():
            facts = [evaluation(round_ * 3 + i) for i in range(3)]
            office.store.ingest(attempt_id(job.id, 1), token, batch(facts, first_seq=round_ * 3))
            office.receiver.wait_for(before + 2, "/ok")
    office.receiver.fails = set()
    with office.dispatching():
        wait_until(office.nothing_waits, 20, "all is told")
    seqs = [event.seq for event in office.store.events(job.id)]
    assert len(seqs) == 15
    assert told(office.receiver, "/ok") == [(job.id, seq) for seq in seqs]
    assert {post.name for post in office.receiver.posts} == {f"{hook.id}.{job.id}.{seq}" for seq in seqs}
    assert [each.error for each in office.store.webhooks.deliveries(hook.id)].count(None) >= len(seqs)


def test_a_webhook_that_hangs_delays_no_other(office: Office) -> None:
    hanging = [office.hook("/hangs") for _ in range(16)]
    office.hook("/ok")
    with office.dispatching(timeout_s=60.0):
        for _ in range(3):
            office.store.create(spec())
        office.receiver.wait_for(3, "/ok", timeout_s=20)
        office.receiver.wait_for(16, "/hangs", timeout_s=20)
        began = time.monotonic()
    assert time.monotonic() - began < 20  # nor does it delay the end
    office.receiver.let_go.set()
    told = [delivery for hook in hanging for delivery in office.store.webhooks.deliveries(hook.id)]
    assert told == []


def test_of_two_dispatchers_one_delivers_and_the_other_goes_on_when_it_ends(office: Office) -> None:
    office.hook("/ok")
    assert office.store.acquire_lease("webhooks", "one that was killed", 0.5) is not None
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(office.dispatching())
        office.store.create(spec())
        office.receiver.wait_for(1, "/ok")
        second.enter_context(office.dispatching())
        for _ in range(10):
            office.store.create(spec())
        office.receiver.wait_for(11, "/ok")
        wait_until(office.nothing_waits, 20, "all is told")
        assert len(office.receiver.posts) == 11  # nothing twice
        first.close()
        office.store.create(spec())
        office.receiver.wait_for(12, "/ok")


def test_after_its_time_a_failing_webhook_is_left_alone_until_a_test_succeeds(office: Office) -> None:
    hook = office.hook("/fails")
    office.receiver.fails = {"/fails"}
    with office.dispatching(Backoff(first_s=0.05, longest_s=0.1, rest_s=0.05, give_up_s=0.5)):
        lost, _ = office.store.create(spec())
        wait_until(lambda: office.store.webhooks.get(hook.id).state is WebhookState.FAILING, 20, "given up")
        wait_until(lambda: office.store.audit.page().items, 20, "on record")
        (entry,) = office.store.audit.page().items
        assert (entry.action, entry.target) == ("webhook given up", f"/v1/webhooks/{hook.id}")
        assert f"{lost.id}.1 could not be delivered since" in entry.detail
        assert "answered 500" in entry.detail
        assert office.nothing_waits()
        office.store.create(spec())
        assert office.nothing_waits()
        office.receiver.fails = set()
        (failed, *_) = office.store.webhooks.deliveries(hook.id)
        worked = failed.model_copy(update={"error": None, "status": 200})
        assert office.store.webhooks.record_test(hook.id, worked).state is WebhookState.ACTIVE
        known = len(office.receiver.posts)
        job, _ = office.store.create(spec())
        *_, last = office.receiver.wait_for(known + 1, "/fails")
    assert json.loads(last.body)["job_id"] == job.id


def test_an_event_that_is_refused_holds_up_its_own_job_alone(office: Office) -> None:
    office.hook("/ok")
    refused, others = office.running_job()[0], [office.running_job()[0] for _ in range(2)]
    office.receiver.fails = {refused.id}
    with office.dispatching():
        expected = {(job.id, seq) for job in others for seq in (1, 2, 3)}
        wait_until(lambda: expected <= set(told(office.receiver, "/ok")), 20, "the others' events")
        assert {seq for job, seq in told(office.receiver, "/ok") if job == refused.id} <= {1}
        office.receiver.fails = set()
        wait_until(office.nothing_waits, 20, "all is told")
    assert [seq for job, seq in told(office.receiver, "/ok") if job == refused.id] == [1, 2, 3]


def test_what_cannot_be_signed_waits_until_its_secret_is_back(office: Office) -> None:
    hook = office.hook("/ok")
    (office.secrets / "good").rename(office.secrets / "away")
    with office.dispatching():
        jobs = [office.store.create(spec())[0].id for _ in range(3)]
        wait_until(lambda: len(office.store.webhooks.deliveries(hook.id)) >= 3, 20, "tried")
        assert office.receiver.posts == []
        (office.secrets / "away").rename(office.secrets / "good")
        office.receiver.wait_for(3, "/ok")
    assert sorted(told(office.receiver, "/ok")) == sorted((job, 1) for job in jobs)
