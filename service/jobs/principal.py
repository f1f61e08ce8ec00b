"""Who asks: principals, what their role allows, and the keys that they show."""

from enum import StrEnum
from typing import Annotated

from pydantic import AwareDatetime, Field

from service.jobs.job import View
from service.jobs.spec_part import SpecPart

PRINCIPAL_NAME = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-z0-9][a-z0-9._-]*$")]

ANONYMOUS = "anonymous"
"""The principal of every request where no keys are asked for: a service on loopback, used by its own machine."""

ADMIN = "admin"
"""The principal of the service's operator, who shows ``SYNCBN_API_TOKEN`` as a key."""

_DAY_S = 86400.0


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


class Quota(SpecPart):
    """What one principal may hold at once; ``null`` is no limit."""

    max_running_workers: Annotated[int, Field(ge=0)] | None = None
    max_queued_jobs: Annotated[int, Field(ge=0)] | None = None


class Principal(View):
    """Someone, or some program, that uses the service."""

    name: PRINCIPAL_NAME
    role: Role
    quota: Quota = Quota()


class PrincipalTerms(SpecPart):
    """What a principal may be and hold, as an admin sets it."""

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

    key: Annotated[str, Field(repr=False)]


class KeyOrder(SpecPart):
    """A key to be made; without ``expires_in_s`` it is good until it is revoked."""

    principal: PRINCIPAL_NAME
    expires_in_s: Annotated[float, Field(gt=0, le=3660 * _DAY_S)] | None = None


class KeyRotation(SpecPart):
    """How a key is replaced: the old one stays good for ``grace_s`` more, so that its users can change over."""

    grace_s: Annotated[float, Field(ge=0, le=30 * _DAY_S)] = 0.0


class Caller(View):
    """Who asks, and by which stored key; none where no keys are asked for, or the service's own token was shown."""

    principal: Principal
    key: ApiKey | None = None
