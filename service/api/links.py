"""Links of the OpenAPI document: from the request that makes something to every route about it.

A reader learns where an id leads; tools that follow links try what a client does, one request after the other.
"""

from collections.abc import Iterator
from typing import Any

_MAKERS = {
    ("/v1/jobs", "post"): "job_id",
    ("/v1/jobs/{job_id}:retry", "post"): "job_id",
    ("/v1/api-keys", "post"): "key_id",
    ("/v1/api-keys/{key_id}:rotate", "post"): "key_id",
    ("/v1/webhooks", "post"): "hook_id",
}
"""The operations that answer 201 with the ``id`` of what they made, and how paths call that id."""


def add_links(document: dict[str, Any]) -> None:
    """Let the answers of those that make something link to each route with its id in the path."""
    for (path, method), parameter in _MAKERS.items():
        made = document["paths"][path][method]["responses"]["201"]
        made["links"] = {
            operation_id: {"operationId": operation_id, "parameters": {parameter: "$response.body#/id"}}
            for operation_id in _operations_about(parameter, document)
        }


def _operations_about(parameter: str, document: dict[str, Any]) -> Iterator[str]:
    for path, operations in document["paths"].items():
        if f"{{{parameter}}}" in path:
            yield from (operation["operationId"] for operation in operations.values())
