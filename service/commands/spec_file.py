"""A job's spec as the command line takes it: a file, or JSON on stdin, with single fields changed by ``--set``."""

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

from service.commands.connection import checked
from service.errors import FieldProblem, InvalidRequest
from service.jobs import JobSpec


def read_spec(path: Path, assignments: list[str]) -> JobSpec:
    """The spec in a .json or .toml file (``-``: JSON on stdin), with each ``field=value`` put in.

    Raises: InvalidRequest where the file cannot be read, and with every wrong field.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text()
        fields = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InvalidRequest([FieldProblem("", "unreadable", f"cannot read {path}: {error}")]) from None
    if not isinstance(fields, dict):
        raise InvalidRequest([FieldProblem("", "not_an_object", f"{path} must hold one object of fields")])
    for assignment in assignments:
        _assign(fields, assignment)
    return checked(lambda: JobSpec.model_validate(fields))


def _assign(fields: dict[str, Any], assignment: str) -> None:
    name, equals, text = assignment.partition("=")
    if not equals or not name:
        raise InvalidRequest([FieldProblem("", "bad_assignment", f"--set {assignment}: write it as field=value")])
    *parents, last = name.split(".")
    for parent in parents:
        fields = fields.setdefault(parent, {})
    try:
        fields[last] = json.loads(text)
    except ValueError:
        fields[last] = text
