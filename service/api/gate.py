"""The gate before ``/v1`` and ``/metrics``: who asks is known, and has not asked too often, before a body is read."""

from anyio.to_thread import run_sync
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.doorkeeper import Doorkeeper
from service.api.problems import from_error
from service.api.rates import Rate, RateLimits, Standing, neighbourhood
from service.errors import ServiceError, TooManyRequests, Unauthorized
from service.jobs import ANONYMOUS, Caller

GUARDED = "/v1/"
_OWN_TOKENS = "/v1/attempts/"
"""Where attempts report, with tokens of their own that the store judges."""
_METRICS = "/metrics"


class Gate:
    """Lets known callers in, as ``request.state.caller``; answers 401 to others and 429 to who asks too often.

    A 429 of this gate is not put on record, which would only help whoever floods. Where no keys are asked for nobody
    is counted.
    """

    def __init__(self, app: ASGIApp, doorkeeper: Doorkeeper, limits: RateLimits) -> None:
        self._app = app
        self._doorkeeper = doorkeeper
        self._requests = Rate("requests", limits.requests)
        self._refusals = Rate("refusals", limits.refusals)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 401, 429, or 503 where the store cannot tell who asks."""
        if guarded(scope):
            try:
                scope["state"]["caller"] = await self._let_in(scope)
            except ServiceError as error:
                await from_error(Request(scope), error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _let_in(self, scope: Scope) -> Caller:
        address = neighbourhood(client_address(scope))
        before = self._refusals.look(address)
        key = _bearer(Headers(scope=scope).get("authorization", ""))
        try:
            caller = await run_sync(lambda: self._doorkeeper.identify(key, try_token=before.allowed))
        except Unauthorized:
            self._bound(scope, self._refusals.take(address), "this address has shown too many wrong keys")
            raise
        if caller.principal.name != ANONYMOUS:
            name = caller.principal.name
            self._bound(scope, self._requests.take(name), f"{name} asks more often than it may")
        return caller

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
    return str(scope["path"]).startswith(_OWN_TOKENS)


def _bearer(header: str) -> str | None:
    scheme, _, key = header.partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None
