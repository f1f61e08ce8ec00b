"""Who asks: principals, what their role allows, and the keys that they show."""

from enum import StrEnum
from typing import Annotated

from pydantic import AwareDatetime, Field

from service.jobs.job import View

PRINCIPAL_NAME = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-z0-9][a-z0-9._-]*$")]

ANONYMOUS = "anonymous"
"""The principal of every request where no keys are asked for: a service on loopback, used by its own machine."""


class Role(StrEnum):
    """What a principal may do; each role may do what the ones before it may."""

    READER = "reader"
    """Look at the own jobs."""
    SUBMITTER = "submitter"
    """Submit jobs, and steer the own ones."""
    ADMIN = "admin"
    """See and steer everyone's jobs; manage principals, keys and the audit trail."""

    def includes(self, other: "Role") -> bool:
        """Whether whoever has this role has the other one too."""
        return list(Role).index(self) >= list(Role).index(other)


class Quota(View):
    """What one principal may hold at once; ``null`` is no limit."""

    max_running_workers: Annotated[int, Field(ge=0)] | None = None
    max_queued_jobs: Annotated[int, Field(ge=0)] | None = None


class Principal(View):
    """Someone, or some program, that uses the service."""

    name: PRINCIPAL_NAME
    role: Role
    quota: Quota = Quota()


class ApiKey(View):
    """A key as it is listed: never the key itself, which is shown once, at its making."""

    id: str
    principal: PRINCIPAL_NAME
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None
    revoked_at: AwareDatetime | None = None
    last_used_at: AwareDatetime | None = None


class NewApiKey(ApiKey):
    """A key at its making: the only time that ``key`` is told."""

    key: str
