"""From pydantic's places of errors to JSON pointers (RFC 6901) into what the caller sent."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from service.errors import FieldProblem

_SOURCES = ("body", "query", "path", "header")


def field_problems(errors: Iterable[Mapping[str, Any]], body: object) -> list[FieldProblem]:
    """One problem for each error that FastAPI found in a request."""
    return [FieldProblem(_pointer_of_request(error["loc"], body), error["type"], _message(error)) for error in errors]


def body_problems(errors: Iterable[Mapping[str, Any]], body: object) -> list[FieldProblem]:
    """One problem for each error that pydantic found in ``body``."""
    return [FieldProblem(pointer(error["loc"], body), error["type"], error["msg"]) for error in errors]


def pointer(loc: Sequence[str | int], body: object) -> str:
    """Where ``loc`` is in ``body``; tags of unions, which pydantic names on its way, are left out."""
    node: Any = body
    steps: list[str] = []
    for depth, step in enumerate(loc):
        if depth and isinstance(node, dict) and step in (node.get("type"), node.get("name")):
            continue
        steps.append(str(step).replace("~", "~0").replace("/", "~1"))
        node = _child(node, step)
    return "".join(f"/{step}" for step in steps)


def _pointer_of_request(loc: Sequence[str | int], body: object) -> str:
    source, *rest = loc
    assert source in _SOURCES
    if source == "body" and rest and isinstance(body, str):
        return ""  # not JSON: the place is a letter, not a field
    return pointer(rest, body if source == "body" else None)


def _message(error: Mapping[str, Any]) -> str:
    reason = error.get("ctx", {}).get("error") if error["type"] == "json_invalid" else None
    return f"{error['msg']}: {reason}" if reason else str(error["msg"])


def _child(node: Any, step: str | int) -> Any:
    if isinstance(node, dict):
        return node.get(step)
    if isinstance(node, list) and isinstance(step, int) and 0 <= step < len(node):
        return node[step]
    return None
