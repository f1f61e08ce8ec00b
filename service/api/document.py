"""The OpenAPI document: what FastAPI writes, with errors under the media type that they really have."""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

from service.api.problems import MEDIA_TYPE, Problem

_UNUSED = ("HTTPValidationError", "ValidationError")
"""FastAPI's own error bodies, which it documents wherever a route has parameters; `problems` answers instead."""


class Api(FastAPI):
    """The app, with its document."""

    def openapi(self) -> dict[str, Any]:
        """The document, made once."""
        if self.openapi_schema is None:
            document = super().openapi()
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"] = dict(_true_responses(operation["responses"]))
            for name in _UNUSED:
                document["components"]["schemas"].pop(name, None)
            self.openapi_schema = document
        return self.openapi_schema


def _true_responses(responses: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for status, response in responses.items():
        content = {
            MEDIA_TYPE if _refers_to(entry, Problem.__name__) else media_type: entry
            for media_type, entry in response.get("content", {}).items()
        }
        if not any(_refers_to(entry, _UNUSED[0]) for entry in content.values()):
            yield status, response | {"content": content} if content else response


def _refers_to(entry: dict[str, Any], name: str) -> bool:
    return entry.get("schema") == {"$ref": f"#/components/schemas/{name}"}
