"""One try to deliver one message: signed, to an address that was judged, within a bounded time."""

import asyncio
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime

import httpx2
from pydantic import HttpUrl

from service.jobs import Webhook, WebhookDelivery, WebhookMessage
from service.webhooks.addresses import Address, AddressGuard, Refused
from service.webhooks.secret_files import SecretFiles, SecretUnreadable
from service.webhooks.signing import signature

TIMEOUT_S = 10.0
"""Of a whole try, from resolving the name to the answer's status."""

MAX_ANSWER_BYTES = 1024
"""Of an answer's body, so that a small one is not cut off; nothing of it is kept."""

_BODY_TIMEOUT_S = 1.0


class _Failed(Exception):
    """The try failed before there was an answer."""


class Sender:
    """Sends messages; ``tls`` says whose certificates are believed, by default those that the system believes.

    No proxy of the environment is used: it would choose the address in the guard's place.
    """

    def __init__(
        self,
        guard: AddressGuard,
        secrets: SecretFiles,
        *,
        timeout_s: float = TIMEOUT_S,
        tls: ssl.SSLContext | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._guard = guard
        self._secrets = secrets
        self._timeout_s = timeout_s
        self._tls = tls or ssl.create_default_context()
        self._wall = wall

    async def send(self, hook: Webhook, delivery_id: str, message: WebhookMessage) -> WebhookDelivery:
        """What came of one try; only a 2xx answer within the time is success. Never raises for what others do."""
        began_at, began = self._wall(), time.monotonic()
        status, error = None, None
        try:
            headers, body = self._seal(hook, delivery_id, message, str(int(began_at)))
            status = await self._post(HttpUrl(hook.url), headers, body)
            error = _complaint(status)
        except TimeoutError:
            error = f"no answer within {self._timeout_s:g} s"
        except (_Failed, Refused, SecretUnreadable) as failure:
            error = str(failure)
        return WebhookDelivery(
            time=datetime.fromtimestamp(began_at, UTC),
            event=message.type,
            job_id=message.job_id,
            seq=message.seq,
            status=status,
            error=error,
            duration_s=time.monotonic() - began,
        )

    def _seal(
        self, hook: Webhook, delivery_id: str, message: WebhookMessage, timestamp: str
    ) -> tuple[dict[str, str], bytes]:
        body = message.model_dump_json().encode()
        headers = {
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": "syncbn-webhook",
            "Syncbn-Event": message.type,
            "Syncbn-Delivery": delivery_id,
            "Syncbn-Timestamp": timestamp,
            "Syncbn-Signature": signature(self._secrets.read(hook.secret), timestamp, body),
        }
        return headers, body

    async def _post(self, url: HttpUrl, headers: dict[str, str], body: bytes) -> int:
        """The status of the answer. Each try has a connection of its own, as its address is judged anew."""
        timeout = httpx2.Timeout(self._timeout_s)
        async with httpx2.AsyncClient(verify=self._tls, trust_env=False, timeout=timeout) as client:
            try:
                async with asyncio.timeout(self._timeout_s):
                    answer = await self._ask(client, url, headers, body)
            except httpx2.TimeoutException:
                raise TimeoutError from None
            except httpx2.HTTPError as error:
                raise _Failed(_what_broke(error)) from error
            await _hear_out(answer)
            return answer.status_code

    async def _ask(
        self, client: httpx2.AsyncClient, url: HttpUrl, headers: dict[str, str], body: bytes
    ) -> httpx2.Response:
        named = httpx2.URL(str(url))
        # A certificate is judged by the name, whatever address stands in its place.
        extensions = {"sni_hostname": named.raw_host.decode("ascii").strip("[]")}
        headers = {"Host": named.netloc.decode("ascii"), **headers}

        async def ask(address: Address) -> httpx2.Response:
            target = named.copy_with(host=str(address))
            request = client.build_request("POST", target, content=body, headers=headers, extensions=extensions)
            return await client.send(request, stream=True, follow_redirects=False)

        *first, last = await self._guard.addresses(url, self._timeout_s)
        for address in first:
            with suppress(httpx2.ConnectError):  # nothing was sent yet: the name's next address may be better
                return await ask(address)
        return await ask(last)


async def _hear_out(answer: httpx2.Response) -> None:
    """Take a small body off the connection and let go of it: closed with bytes unread, it would be reset."""
    with suppress(httpx2.HTTPError, TimeoutError):
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for _ in answer.aiter_raw(MAX_ANSWER_BYTES):
                break
    await answer.aclose()


def _complaint(status: int) -> str | None:
    if 200 <= status < 300:
        return None
    return f"answered {status}{'; redirects are not followed' if 300 <= status < 400 else ''}"


def _what_broke(error: httpx2.HTTPError) -> str:
    """What happened, without the address: whoever made the webhook has told its name alone."""
    if isinstance(error, httpx2.ConnectError):
        return "its certificate does not hold" if "CERTIFICATE" in str(error) else "no connection could be made"
    return f"the connection broke before an answer ({type(error).__name__})"
