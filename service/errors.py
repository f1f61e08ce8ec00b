"""The errors that callers of the service can meet, as one tree.

::

    ServiceError             500  something of ours broke
    |- InvalidRequest        422  what was asked for is wrong, field by field
    |- NotFound              404  no such job, attempt, layer or metric
    |- Conflict              409  the job's state does not allow it
    |- PreconditionFailed    412  the job is no longer the version that was named
    |- Unauthorized          401  no key, or not a right one
    |- Forbidden             403  the role or the owner does not allow it
    |- Gone                  410  it was there, and has been removed
    |- TooManyRequests       429  faster, or more at once, than this principal may
    |- StoreUnavailable      503  the database does not answer
    `- ClusterUnreachable    503  Ray does not answer, or not to us
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FieldProblem:
    """One wrong field of a request: where (JSON pointer), which rule, and what to do."""

    pointer: str
    code: str
    message: str


class ServiceError(Exception):
    """Base of all; ``code`` is stable, ``retryable`` tells whether the same request may succeed later."""

    status = 500
    code = "service_error"
    title = "The service failed"
    retryable = False


class InvalidRequest(ServiceError):
    """The request is understood and wrong; ``problems`` names every wrong field."""

    status = 422
    code = "invalid_request"
    title = "The request has wrong fields"

    def __init__(self, problems: Sequence[FieldProblem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{p.pointer}: {p.message}" for p in self.problems))


class NotFound(ServiceError):
    """What was named does not exist."""

    status = 404
    code = "not_found"
    title = "Not found"


class Conflict(ServiceError):
    """The present state does not allow what was asked."""

    status = 409
    code = "conflict"
    title = "The job's state does not allow this"


class PreconditionFailed(ServiceError):
    """``If-Match`` names a version that the job no longer has."""

    status = 412
    code = "precondition_failed"
    title = "The job has changed meanwhile"


class Unauthorized(ServiceError):
    """The token is missing or wrong."""

    status = 401
    code = "unauthorized"
    title = "A valid token is needed"


class Forbidden(ServiceError):
    """Whoever asks is known, and may not do this."""

    status = 403
    code = "forbidden"
    title = "This principal may not do this"


class Gone(ServiceError):
    """It existed, and its time of keeping is over."""

    status = 410
    code = "gone"
    title = "No longer kept"


class TooManyRequests(ServiceError):
    """A limit of this principal is reached; ``retry_after_s`` says when to come back, if time alone helps."""

    status = 429
    code = "too_many_requests"
    title = "Too many at once"
    retryable = True

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class StoreUnavailable(ServiceError):
    """The database does not answer, or its disk is full."""

    status = 503
    code = "store_unavailable"
    title = "The store is unavailable"
    retryable = True


class ClusterUnreachable(ServiceError):
    """Ray does not answer at its address, or refuses the token."""

    status = 503
    code = "cluster_unreachable"
    title = "The cluster cannot be reached"
    retryable = True
