"""Paths that come from outside: read only below the folders that the operator has named."""

from collections.abc import Sequence
from pathlib import Path

from service.errors import FieldProblem
from service.jobs import JobSpec


def data_problems(spec: JobSpec, roots: Sequence[Path] | None, *, must_exist: bool) -> list[FieldProblem]:
    """What is wrong with the folder that a spec's ``data`` names, if it names one; see `path_problems`.

    With ``must_exist`` a folder that may be read must also be there, on this machine. Of one that may not be read
    nobody learns whether it is.
    """
    scheme, _, path = spec.data.partition(":")
    if scheme != "idx":
        return []
    problems = path_problems(path, roots, "/data", "SYNCBN_DATA_ROOTS")
    if not problems and must_exist and not Path(path).exists():
        problems.append(FieldProblem("/data", "path_missing", f"{path} does not exist on this machine"))
    return problems


def path_problems(path: str, roots: Sequence[Path] | None, pointer: str, knob: str) -> list[FieldProblem]:
    """Why ``path`` may not be read: it does not lie below any of ``roots`` (None: it may lie anywhere).

    Symbolic links and ``..`` are followed first, as they are on this machine now. ``pointer`` is the field that the
    path came in, ``knob`` the setting that names the roots.
    """
    if roots is None:
        return []
    try:
        resolved = Path(path).resolve()
        below = any(resolved.is_relative_to(root.resolve()) for root in roots)
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that is none
        return [FieldProblem(pointer, "path_invalid", f"cannot be followed: {error}")]
    if below:
        return []
    allowed = ", ".join(str(root) for root in roots) or "no folder at all"
    text = f"may not be read: jobs may read from {allowed}; the service's operator can change that with {knob}"
    return [FieldProblem(pointer, "path_not_allowed", text)]
