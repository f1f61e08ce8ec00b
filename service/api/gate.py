"""The gate before ``/v1`` and ``/metrics``: who asks is known, and has not asked too often, before a body is read.

Attempts report through it too, with tokens of their own, which open nothing else.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from anyio import move_on_after
from anyio.to_thread import run_sync
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.doorkeeper import Doorkeeper
from service.api.problems import from_error
from service.api.rates import Rate, RateLimits, Standing, neighbourhood
from service.errors import ServiceError, StoreUnavailable, TooManyRequests, Unauthorized
from service.jobs import ANONYMOUS, Caller

GUARDED = "/v1/"
RECHECK_S = 15.0
"""How soon an open stream notices that its key was revoked or has expired."""

_ATTEMPTS = "/v1/attempts/"
_METRICS = "/metrics"


_Answer = TypeVar("_Answer")


class Gate:
    """Lets known callers in, as ``request.state.caller``; answers 401 to others and 429 to who asks too often.

    A 429 of this gate is not put on record, which would only help whoever floods. Where no keys are asked for nobody
    is counted.
    """

    def __init__(self, app: ASGIApp, doorkeeper: Doorkeeper, limits: RateLimits, recheck_s: float = RECHECK_S) -> None:
        self._app = app
        self._doorkeeper = doorkeeper
        self._recheck_s = recheck_s
        self._requests = Rate("requests", limits.requests)
        self._refusals = Rate("refusals", limits.refusals)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 401, 429, or 503 where the store cannot tell who asks."""
        attend: ASGIApp = self._attend
        let_in = self._let_in
        if _of_attempt(scope):
            let_in, attend = self._let_attempt_in, self._app
        elif not guarded(scope):
            await self._app(scope, receive, send)
            return
        try:
            await let_in(scope)
        except ServiceError as error:
            await from_error(Request(scope), error)(scope, receive, send)
        else:
            await attend(scope, receive, send)

    async def _attend(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on; what is still being told when the key has ended, ends as if its holder had left."""
        key = _bearer_of(scope)
        ended = completed = False

        async def receive_while_good() -> Message:
            nonlocal ended
            while not ended:
                with move_on_after(self._recheck_s):
                    return await receive()
                ended = not await run_sync(self._still_good, key)
            return {"type": "http.disconnect"}

        async def send_noted(message: Message) -> None:
            nonlocal completed
            completed = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        await self._app(scope, receive_while_good, send_noted)
        if ended and not completed:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _still_good(self, key: str | None) -> bool:
        try:
            self._doorkeeper.identify(key)
        except Unauthorized:
            return False
        except StoreUnavailable:
            return True  # a database that is away for a moment ends no stream
        return True

    async def _let_in(self, scope: Scope) -> None:
        caller = await self._caller_of(scope)
        scope["state"]["caller"] = caller
        if caller.principal.name != ANONYMOUS:
            name = caller.principal.name
            self._bound(scope, self._requests.take(name), f"{name} asks more often than it may")

    async def _caller_of(self, scope: Scope) -> Caller:
        guessing = self._refusals.look(neighbourhood(client_address(scope)))
        if guessing.allowed and (known := self._doorkeeper.recall(_bearer_of(scope))) is not None:
            return known
        return await self._judged(scope, self._doorkeeper.identify_and_remember)

    async def _let_attempt_in(self, scope: Scope) -> None:
        attempt_id = str(scope["path"]).removeprefix(_ATTEMPTS).partition("/")[0]
        await self._judged(scope, lambda token, _: run_sync(self._doorkeeper.admit_attempt, attempt_id, token))

    async def _judged(self, scope: Scope, judge: Callable[[str | None, bool], Awaitable[_Answer]]) -> _Answer:
        """What ``judge`` makes of the key, and of whether guessing is still allowed; refusals are counted."""
        address = neighbourhood(client_address(scope))
        before = self._refusals.look(address)
        try:
            return await judge(_bearer_of(scope), before.allowed)
        except Unauthorized:
            self._bound(scope, self._refusals.take(address), "this address has shown too many wrong keys")
            raise

    def _bound(self, scope: Scope, standing: Standing, complaint: str) -> None:
        scope["state"]["headers"] = standing.headers
        if not standing.allowed:
            scope["state"]["on_record"] = False
            text = f"{complaint}: {standing.quota} in {standing.window_s} s; wait {standing.reset_s} s"
            raise TooManyRequests(text, standing.reset_s)


def guarded(scope: Scope) -> bool:
    """Whether the request is for the API proper, whatever route it may lead to."""
    if scope["type"] != "http" or _of_attempt(scope):
        return False
    path = str(scope["path"])
    return path.startswith(GUARDED) or path == _METRICS


def client_address(scope: Scope) -> str:
    """Where the request comes from, as far as the server can tell; empty where it cannot."""
    client = scope.get("client")
    return client[0] if client else ""


def _of_attempt(scope: Scope) -> bool:
    return scope["type"] == "http" and str(scope["path"]).startswith(_ATTEMPTS)


def _bearer_of(scope: Scope) -> str | None:
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None
