"""One try against a real receiver that does all that receivers do."""

import asyncio
import ssl
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from pydantic import HttpUrl

from service.jobs import Topic, Webhook, WebhookDelivery, WebhookState
from service.webhooks import AddressGuard, SecretFiles, Sender
from service.webhooks.addresses import Address
from service.webhooks.messages import trial_message
from tests.service.webhooks.receiving import Receiver, receiving

NOW = datetime(2026, 1, 2, tzinfo=UTC)
LOOPBACK = AddressGuard([ip_network("127.0.0.0/8")])

Send = Callable[..., WebhookDelivery]


@pytest.fixture
def send(secrets: Path) -> Send:
    """Sends a test message to a URL, once."""

    def send(
        url: str,
        guard: AddressGuard = LOOPBACK,
        *,
        timeout_s: float = 20.0,
        secret: str = "good",
        tls: ssl.SSLContext | None = None,
    ) -> WebhookDelivery:
        hook = Webhook(
            id="hook_1",
            owner="alice",
            url=url,
            events=(Topic.EVERYTHING,),
            secret=secret,
            all=False,
            state=WebhookState.ACTIVE,
            created_at=NOW,
        )
        sender = Sender(guard, SecretFiles(secrets), timeout_s=timeout_s, tls=tls, wall=lambda: 1_700_000_000.9)
        return asyncio.run(sender.send(hook, *trial_message(hook, NOW)))

    return send


def test_only_a_prompt_2xx_answer_of_the_receiver_itself_is_success(receiver: Receiver, send: Send) -> None:
    url = f"http://127.0.0.1:{receiver.port}"
    receiver.fails.add("/fails")
    told = {path: send(url + path) for path in ("/ok", "/fails", "/redirects", "/closes", "/floods")}
    assert {path: (each.status, each.error) for path, each in told.items()} == {
        "/ok": (200, None),
        "/fails": (500, "answered 500"),
        "/redirects": (302, "answered 302; redirects are not followed"),
        "/closes": (None, "the connection broke before an answer (RemoteProtocolError)"),
        "/floods": (200, None),
    }
    assert len(receiver.posts) == 5  # the redirect led nowhere
    for path in ("/hangs", "/drips"):
        late = send(url + path, timeout_s=1.0)
        assert (late.status, late.error) == (None, "no answer within 1 s")
        assert 1.0 <= late.duration_s < 10.0
    receiver.let_go.set()
    gone = send("http://127.0.0.1:9/")
    assert (gone.status, gone.error) == (None, "no connection could be made")


def test_a_message_carries_what_its_receiver_needs(receiver: Receiver, send: Send) -> None:
    assert send(f"http://localhost:{receiver.port}/ok?query=1").time.timestamp() == 1_700_000_000.9
    (post,) = receiver.posts
    assert post.path == "/ok?query=1"
    assert post.headers["Host"] == f"localhost:{receiver.port}"
    assert (post.headers["Syncbn-Event"], post.headers["Syncbn-Timestamp"]) == ("test", "1700000000")
    assert post.headers["Content-Type"] == "application/json"
    assert post.name.startswith("hook_1.test_")


def test_nothing_is_sent_that_the_guard_or_the_secret_does_not_allow(receiver: Receiver, send: Send) -> None:
    refused = send(f"https://localhost:{receiver.port}/ok", AddressGuard())
    assert "not on the public internet" in str(refused.error)
    assert "no secret of this name" in str(send(f"http://localhost:{receiver.port}/ok", secret="gone").error)
    assert receiver.posts == []


class Judgement(AddressGuard):
    """Has judged already: whatever the name may become, the receiver was at this address."""

    async def addresses(self, url: HttpUrl, timeout_s: float) -> list[Address]:
        return [ip_address("127.0.0.2"), ip_address("127.0.0.1")]


def test_the_connection_goes_to_the_address_that_was_judged_whatever_the_name_becomes(
    receiver: Receiver, send: Send
) -> None:
    """A name that ends in .invalid never resolves (RFC 6761), so nobody can have looked a second time."""
    told = send(f"http://receiver.invalid:{receiver.port}/ok", Judgement())
    assert told.error is None
    (post,) = receiver.posts  # the first of the two addresses does not answer
    assert post.headers["Host"] == f"receiver.invalid:{receiver.port}"


def test_a_certificate_is_judged_by_the_name_and_not_by_the_address(tmp_path: Path, send: Send) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    name = ["-nodes", "-days", "1", "-subj", "/CN=r", "-addext", "subjectAltName=DNS:receiver.invalid,IP:127.0.0.1"]
    made: list[str | Path] = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-keyout", key, "-out", cert, *name]
    subprocess.run(made, check=True, capture_output=True, timeout=60)
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(cert, key)
    trusting = ssl.create_default_context(cafile=str(cert))
    with receiving(served) as receiver:
        urls = [f"https://{host}.invalid:{receiver.port}/ok" for host in ("receiver", "other")]
        told = [send(url, Judgement(), tls=trusting) for url in urls]
        assert [each.error for each in told] == [None, "its certificate does not hold"]
        assert send(urls[0], Judgement()).error == "its certificate does not hold"  # nobody known has signed it
        assert len(receiver.posts) == 1
