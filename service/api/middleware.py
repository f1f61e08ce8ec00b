"""What every request passes before any route: a name of its own, a look at its Host, a limit on its size."""

import re
import secrets
from collections.abc import Sequence

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import problem

_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(:\d+)?")


class RequestIds:
    """Names each request and tells the name in ``X-Request-ID``, so that an answer can be found in the log.

    Adds the fields that others have noted under ``request.state.headers`` on the way.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, with ``request.state.request_id``."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                headers.update(scope["state"].get("headers", {}))
            await send(message)

        with structlog.contextvars.bound_contextvars(request=request_id):
            await self._app(scope, receive, send_named)


class AllowedHosts:
    """Refuses requests whose Host header names another machine: a browser led here by a rebound DNS name."""

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self._app = app
        self._allowed = frozenset(host.lower() for host in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 400."""
        if scope["type"] == "http" and not self._allows(Headers(scope=scope).get("host", "")):
            title, detail = "The host is not allowed", "the Host header names no address of this service"
            refusal = problem(Request(scope), 400, "host_not_allowed", title, detail)
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _allows(self, header: str) -> bool:
        match = _HOST.fullmatch(header)
        return "*" in self._allowed or (match is not None and match[1].lower() in self._allowed)


class BodyLimit:
    """Refuses bodies of more than ``max_bytes``, as soon as their size is known or has been exceeded."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if length.isdigit() and int(length) > self._max_bytes:
            refusal = problem(Request(scope), 413, "body_too_large", "Content Too Large", self._detail)
            await refusal(scope, receive, send)
            return
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise HTTPException(413, self._detail)
            return message

        await self._app(scope, receive_counted, send)

    @property
    def _detail(self) -> str:
        return f"the body is larger than {self._max_bytes} bytes"
