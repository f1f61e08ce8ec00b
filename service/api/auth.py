"""Who may ask: the bearer of the service's token, where one is set; and what kind of body may be sent."""

import hmac
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException

from service.api.parts import PartsOf
from service.errors import Unauthorized

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
