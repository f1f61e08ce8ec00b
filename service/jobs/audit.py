"""The audit trail: who asked for which change, and what came of it."""

from pydantic import AwareDatetime

from service.jobs.job import View


class AuditEntry(View):
    """One request that would change something, granted or refused, as it was answered."""

    principal: str | None = None
    """Who asked; null where no right key was shown."""
    key_id: str | None = None
    """The stored key that was shown, by its id."""
    address: str = ""
    """Where the request came from; ``local`` for a command on the service's own machine."""
    action: str
    """The method and the route, or the command."""
    target: str
    """The path of what was to be changed or was made."""
    detail: str = ""
    """What was asked for, where the target does not tell."""
    status: int
    """The HTTP status of the answer; below 400 it was done."""
    code: str | None = None
    """The problem's code, of a request that was not granted."""
    request_id: str


class AuditRecord(AuditEntry):
    """An entry in its place in the trail; ``seq`` grows from entry to entry."""

    seq: int
    time: AwareDatetime


class AuditPage(View):
    """A page of the trail, newest first; ``next_cursor`` is absent on the last one."""

    items: tuple[AuditRecord, ...]
    next_cursor: str | None = None
