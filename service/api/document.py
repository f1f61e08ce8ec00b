"""The OpenAPI document: what FastAPI writes, with errors under the media type that they really have.

Beside the security scheme of an operation stands the least role that it needs, as OpenAPI 3.1 allows for schemes that
have no scopes; with it come the refusals that every such operation may answer.
"""

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI

from service.api.auth import KEY_SCHEME
from service.api.event_stream import EventStream
from service.api.links import add_links
from service.api.problems import MEDIA_TYPE, Problem
from service.jobs import Role

_UNUSED = ("HTTPValidationError", "ValidationError")
"""FastAPI's own error bodies, which it documents wherever a route has parameters; `problems` answers instead."""

_MESSAGES = {
    "itemSchema": {
        "type": "object",
        "properties": {name: {"type": "string"} for name in ("event", "id", "data")},
        "required": ["event", "data"],
    }
}
"""One message of a stream, in the words of OpenAPI 3.2."""


class Api(FastAPI):
    """The app, with its document."""

    def openapi(self) -> dict[str, Any]:
        """The document, made once."""
        if self.openapi_schema is None:
            document = super().openapi()
            for path in document["paths"].values():
                for operation in path.values():
                    responses = dict(_true_responses(operation["responses"]))
                    if (role := _least_role(operation)) is not None:
                        operation["security"] = [{KEY_SCHEME: [role]}]
                        responses |= _refusals(role)
                    operation["responses"] = dict(sorted(responses.items()))
            add_links(document)
            for name in _UNUSED:
                document["components"]["schemas"].pop(name, None)
            self.openapi_schema = document
        return self.openapi_schema


def _least_role(operation: dict[str, Any]) -> Role | None:
    """The greatest of the roles that the router and the route ask for."""
    roles = [role for entry in operation.get("security", ()) for role in entry.get(KEY_SCHEME, ())]
    return max(map(Role, roles), key=list(Role).index, default=None)


def _refusals(role: Role) -> dict[str, Any]:
    statuses = (401, 429) if role is Role.READER else (401, 403, 429)
    content = {MEDIA_TYPE: {"schema": {"$ref": f"#/components/schemas/{Problem.__name__}"}}}
    return {str(status): {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def _true_responses(responses: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for status, response in responses.items():
        content = {
            MEDIA_TYPE if _refers_to(entry, Problem.__name__) else media_type: (
                _MESSAGES if media_type == EventStream.media_type else entry
            )
            for media_type, entry in response.get("content", {}).items()
        }
        if not any(_refers_to(entry, _UNUSED[0]) for entry in content.values()):
            yield status, response | {"content": content} if content else response


def _refers_to(entry: dict[str, Any], name: str) -> bool:
    return entry.get("schema") == {"$ref": f"#/components/schemas/{name}"}
