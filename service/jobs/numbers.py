"""Numbers as they travel: JSON has no NaN and no infinities, so those are words, and the schema says so."""

from typing import Any

_WORDS = ["NaN", "Infinity", "-Infinity"]


def say_non_finite(schema: dict[str, Any]) -> None:
    """Let every number of a model's JSON schema also be one of the words for what JSON cannot say.

    For ``json_schema_extra`` of models whose ``ser_json_inf_nan`` is "strings".
    """
    for name, field in schema.get("properties", {}).items():
        schema["properties"][name] = _widened(field)


def _widened(node: Any) -> Any:
    if isinstance(node, list):
        return [_widened(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {
        name: _widened(value) if name in ("anyOf", "items", "prefixItems") else value for name, value in node.items()
    }
    if node.get("type") != "number":
        return node
    outer = {name: node.pop(name) for name in ("title", "description", "default") if name in node}
    return {"anyOf": [node, {"type": "string", "enum": _WORDS}], **outer}
