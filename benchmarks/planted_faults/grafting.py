"""How plants get into the ranks of a real service, which knows nothing of them: by the import system of Python.

A service that the benchmark starts has `FOLDER` in its PYTHONPATH, and so have the Ray head and the ranks that come
from it. Light to import: every one of these processes does, and only a rank ever goes on to torch.
"""

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parent / "on_service"
"""Holds a ``sitecustomize.py``, which Python reads at its start."""

_RANK = "service.cluster.rank"
_ROOT = Path(__file__).parents[2]


def python_path() -> str:
    """The PYTHONPATH of a service in whose ranks faults are to be planted; this package must be found there too."""
    return os.pathsep.join(map(str, (FOLDER, _ROOT)))


def install() -> None:
    """From now on, in this process, a rank trains by `planted_training.planted`."""
    sys.meta_path.insert(0, _RankFinder())


class _RankFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _RANK:
            return None
        found = PathFinder.find_spec(fullname, path, target)
        if found is not None and found.origin is not None:
            found.loader = _GraftingLoader(fullname, found.origin)
        return found


class _GraftingLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        from benchmarks.planted_faults.planted_training import planted

        vars(module)["train"] = planted(vars(module)["train"])
