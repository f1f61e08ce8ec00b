"""Every error as one kind of answer: ``application/problem+json`` (RFC 9457), whoever found it."""

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from service.api.pointers import field_problems
from service.errors import FieldProblem, InvalidRequest, ServiceError, TooManyRequests

MEDIA_TYPE = "application/problem+json"

_log = structlog.get_logger("api")

_CODE_OF_STATUS = {
    400: "bad_request",
    404: "no_such_route",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
}

_RETRY_AFTER_S = "2"


class ProblemField(BaseModel):
    """One wrong field: its JSON pointer into the body, or ``/name`` of a parameter or header."""

    pointer: str
    code: str
    message: str


class Problem(BaseModel):
    """An error; ``code`` is stable, ``retryable`` tells whether the same request may succeed later."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    retryable: bool
    request_id: str
    errors: list[ProblemField] = Field(default_factory=list)


Answers = dict[int | str, dict[str, Any]]
"""Answers of a route by status, for its documentation."""

PLAIN_TEXT: Answers = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
"""The answer of a route that can tell plain text."""


def answers(*statuses: int) -> Answers:
    """The error answers of a route."""
    return {status: {"model": Problem, "description": HTTPStatus(status).phrase} for status in sorted(statuses)}


def install(app: FastAPI) -> None:
    """Let every error of ours, of the framework and of nobody's making become a problem."""
    app.add_exception_handler(ServiceError, _from_service)
    app.add_exception_handler(HTTPException, _from_framework)
    app.add_exception_handler(RequestValidationError, _from_validation)
    app.add_exception_handler(Exception, _from_bug)


def from_error(request: Request, error: ServiceError) -> Response:
    """The answer to a `ServiceError`."""
    return problem(
        request,
        error.status,
        error.code,
        error.title,
        str(error),
        retryable=error.retryable,
        errors=error.problems if isinstance(error, InvalidRequest) else (),
        headers=_headers(error),
    )


def problem(
    request: Request,
    status: int,
    code: str,
    title: str,
    detail: str,
    *,
    retryable: bool = False,
    errors: Sequence[FieldProblem] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """One problem as a response."""
    request_id = getattr(request.state, "request_id", "")
    request.state.problem_code = code  # for the record of the request
    body = Problem(
        type=f"urn:syncbn:problem:{code}",
        title=title,
        status=status,
        detail=detail,
        instance=request.url.path,
        code=code,
        retryable=retryable,
        request_id=request_id,
        errors=[ProblemField(**vars(error)) for error in errors],
    )
    told = {**(headers or {}), "X-Request-ID": request_id}
    content = body.model_dump_json(exclude=None if errors else {"errors"})
    return Response(content, status, headers=told, media_type=MEDIA_TYPE)


def _headers(error: ServiceError) -> dict[str, str]:
    if isinstance(error, TooManyRequests):
        return {} if error.retry_after_s is None else {"Retry-After": str(math.ceil(error.retry_after_s))}
    return {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": _RETRY_AFTER_S}}.get(error.status, {})


def _from_service(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return from_error(request, error)


def _from_framework(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _CODE_OF_STATUS.get(error.status_code, "http_error")
    title = HTTPStatus(error.status_code).phrase
    detail = {
        404: f"there is nothing at {request.url.path}",
        405: f"{request.url.path} does not answer {request.method}",
    }.get(error.status_code, error.detail)
    return problem(request, error.status_code, code, title, detail, headers=error.headers)


def _from_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return from_error(request, InvalidRequest(field_problems(error.errors(), error.body)))


def _from_bug(request: Request, error: Exception) -> Response:
    request_id = getattr(request.state, "request_id", "")
    _log.error("a request failed", request=request_id, path=request.url.path, exc_info=error)
    detail = f"this is a defect of the service; its log tells more under request id {request_id}"
    return problem(request, 500, ServiceError.code, ServiceError.title, detail)
