"""Puts every request that would change something on record, whatever came of it, before its answer leaves.

The record of a new job is stored in one transaction with it, so that there is the one exactly if there is the other;
all other records are written when the answer is known.
"""

import structlog
from anyio.to_thread import run_sync
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.gate import client_address, guarded
from service.api.problems import from_error
from service.errors import ServiceError, StoreUnavailable
from service.jobs import AuditEntry, Caller
from service.store import JobStore

_READING = frozenset({"GET", "HEAD", "OPTIONS"})

_log = structlog.get_logger("service.audit")


class Recording:
    """Writes the audit trail. What was done without a record being possible is answered 503, never as done."""

    def __init__(self, app: ASGIApp, store: JobStore) -> None:
        self._app = app
        self._store = store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on; the answer waits until it is on record."""
        if not guarded(scope) or scope["method"] in _READING:
            await self._app(scope, receive, send)
            return
        replaced = False

        async def send_recorded(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start":
                location = Headers(raw=message.get("headers", [])).get("location")
                replacement = await self._record(scope, message["status"], location)
                if replacement is not None:
                    replaced = True
                    await from_error(Request(scope), replacement)(scope, receive, send)
            if not replaced:
                await send(message)

        try:
            await self._app(scope, receive, send_recorded)
        except Exception:  # answered as a defect further out; the record must not miss it
            scope["state"]["problem_code"] = ServiceError.code
            await self._record(scope, 500, None)
            raise

    async def _record(self, scope: Scope, status: int, location: str | None) -> ServiceError | None:
        """What is to be answered instead, if anything."""
        if not scope["state"].get("on_record", True):
            return None
        entry = entry_of(scope, status, location)
        try:
            await run_sync(self._store.audit.append, entry)
        except StoreUnavailable as error:
            _log.error("not on record", **entry.model_dump(exclude={"request_id"}))
            if status < 400:
                text = f"this was done, but could not be put on record: {error}; look before you ask again"
                return StoreUnavailable(text)
        return None


def entry_of(scope: Scope, status: int, location: str | None) -> AuditEntry:
    """How a request is put on record that is answered so; ``location`` is where what it made is found."""
    state = scope["state"]
    caller: Caller | None = state.get("caller")
    route = getattr(scope.get("route"), "path", None)
    return AuditEntry(
        principal=None if caller is None else caller.principal.name,
        key_id=None if caller is None or caller.key is None else caller.key.id,
        address=client_address(scope),
        action=f"{scope['method']} {route or '(no route)'}",
        target=location or scope["path"],
        detail=state.get("audit_detail", ""),
        status=status,
        code=state.get("problem_code"),
        request_id=state.get("request_id", ""),
    )


async def changes_nothing(request: Request) -> None:
    """A dependency for routes that are asked by POST and yet change nothing: they are not put on record."""
    request.state.on_record = False


def is_on_record(request: Request) -> None:
    """Let no record be written any more: it was stored with the change itself."""
    request.state.on_record = False


def say_what_for(request: Request, detail: str) -> None:
    """Let the request's record tell ``detail`` too: what a change was for, where its path does not tell."""
    request.state.audit_detail = detail
