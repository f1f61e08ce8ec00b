"""Who may ask: the bearer of the service's token, where one is set; and what kind of body may be sent."""

import hmac
from typing import Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes
from starlette.exceptions import HTTPException

from service.api.parts import PartsOf
from service.errors import Forbidden, Unauthorized
from service.jobs import ANONYMOUS, Principal, Role

_api_bearer = HTTPBearer(auto_error=False, scheme_name="api token", description="SYNCBN_API_TOKEN, where one is set.")
_attempt_bearer = HTTPBearer(auto_error=False, scheme_name="ingest token", description="The token of one attempt.")

_Credentials = HTTPAuthorizationCredentials | None


def require_api_token(parts: PartsOf, given: Annotated[_Credentials, Depends(_api_bearer)]) -> None:
    """Let the request pass if the service has no token, or the request carries it. Raises Unauthorized."""
    if parts.api_token is None:
        return
    expected = parts.api_token.get_secret_value().encode()
    if given is None or not hmac.compare_digest(given.credentials.encode(), expected):
        raise Unauthorized("this service needs its API token, as a bearer token; see SYNCBN_API_TOKEN")


def _asker(parts: PartsOf, given: Annotated[_Credentials, Depends(_api_bearer)]) -> Principal:
    require_api_token(parts, given)
    return Principal(name=ANONYMOUS if parts.api_token is None else "admin", role=Role.ADMIN)


Asker = Annotated[Principal, Depends(_asker)]
"""Who asks. Raises Unauthorized where nobody is known by the key that the request carries."""


def _judge_role(needed: SecurityScopes, asker: Asker) -> None:
    for role in map(Role, needed.scopes):
        if not asker.role.includes(role):
            raise Forbidden(f"this needs the role {role}, and {asker.name} has the role {asker.role}; ask an admin")


def require_role(role: Role) -> Any:
    """A dependency that lets only principals of at least this ``role`` pass, and says so in the OpenAPI document.

    For a route's or a router's ``dependencies``. Raises Unauthorized, or Forbidden where the role is a lesser one.
    """
    return Security(_judge_role, scopes=[role])


def _given_attempt_token(given: Annotated[_Credentials, Depends(_attempt_bearer)]) -> str:
    if given is None:
        raise Unauthorized("this needs the ingest token of the attempt, as a bearer token")
    return given.credentials


AttemptToken = Annotated[str, Depends(_given_attempt_token)]
"""The bearer token of a request that comes from an attempt; the store judges it."""


def require_json(request: Request) -> None:
    """Let the request pass if its body, where it has one, says that it is JSON. Raises HTTPException 415."""
    if request.headers.get("content-length", "") == "0":
        return
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(415, f"the body must be application/json, not {media_type or 'of an unnamed type'}")
