"""Who may ask for what: roles, whose jobs are whose; and what kind of body may be sent."""

from typing import Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes
from starlette.exceptions import HTTPException

from service.api.parts import job_in_path
from service.errors import Forbidden, NotFound, Unauthorized
from service.jobs import Caller, Principal, Role

KEY_SCHEME = "api key"

_api_bearer = HTTPBearer(
    auto_error=False,
    scheme_name=KEY_SCHEME,
    description="A key that an admin has made, or SYNCBN_API_TOKEN; beside it stands the least role that is needed. "
    "A service on loopback that has no keys asks for none.",
)
_attempt_bearer = HTTPBearer(auto_error=False, scheme_name="ingest token", description="The token of one attempt.")

_Credentials = HTTPAuthorizationCredentials | None


async def _caller(request: Request, _documented: Annotated[_Credentials, Depends(_api_bearer)]) -> Caller:
    caller = getattr(request.state, "caller", None)
    if not isinstance(caller, Caller):  # a route outside the gate: a mistake of ours, which shall open nothing
        raise Unauthorized("nobody is known to have asked")
    return caller


WhoCalls = Annotated[Caller, Depends(_caller)]
"""Who asks and by which key, as the gate before all routes has found out."""


async def _asker(caller: WhoCalls) -> Principal:
    return caller.principal


Asker = Annotated[Principal, Depends(_asker)]
"""Who asks."""


def visible_owner(asker: Principal) -> str | None:
    """Whose jobs alone may be listed; None for everyone's."""
    return None if asker.role.includes(Role.ADMIN) else asker.name


async def _require_visible(request: Request, asker: Asker) -> None:
    """Let the request pass if the job in its path, where it names one, may be seen by who asks. Raises NotFound."""
    job_id = request.path_params.get("job_id")
    owner = visible_owner(asker)
    if job_id is None or owner is None:
        return
    job = await job_in_path(request, job_id)
    if job.owner != owner:
        raise NotFound(f"there is no job {job_id}")  # the same words as for one that does not exist


async def _judge_role(
    needed: SecurityScopes, asker: Asker, _visible: Annotated[None, Depends(_require_visible)]
) -> None:
    for role in map(Role, needed.scopes):
        if not asker.role.includes(role):
            raise Forbidden(f"this needs the role {role}, and {asker.name} has the role {asker.role}; ask an admin")


def require_role(role: Role) -> Any:
    """A dependency that lets only principals of at least this ``role`` pass, and says so in the OpenAPI document.

    For a route's or a router's ``dependencies``; every route below ``/v1`` has one. Where a path names a job
    (``{job_id}``), others' jobs do not exist for whoever is no admin. Raises: NotFound, Forbidden.
    """
    return Security(_judge_role, scopes=[role])


async def _given_attempt_token(given: Annotated[_Credentials, Depends(_attempt_bearer)]) -> str:
    if given is None:
        raise Unauthorized("this needs the ingest token of the attempt, as a bearer token")
    return given.credentials


AttemptToken = Annotated[str, Depends(_given_attempt_token)]
"""The bearer token of a request that comes from an attempt; the store judges it."""


async def require_json(request: Request) -> None:
    """Let the request pass if its body, where it has one, says that it is JSON. Raises HTTPException 415."""
    if request.headers.get("content-length", "0") == "0" and "transfer-encoding" not in request.headers:
        return
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(415, f"the body must be application/json, not {media_type or 'of an unnamed type'}")
