"""What the library offers, and what it needs."""

import ast
import sys
from pathlib import Path

import syncbn


def test_the_public_names_are_these() -> None:
    assert syncbn.__all__ == [
        "BatchMoments",
        "Estimator",
        "ExchangeError",
        "JoinableModel",
        "LayerDrift",
        "RanksDisagree",
        "RanksMissing",
        "SyncBatchNorm",
        "accumulate_statistics",
        "apply_statistics",
        "check_agreement",
        "convert_sync_batchnorm",
        "freeze",
        "is_frozen",
        "log_var_ratio",
        "mean_shift",
        "measure_drift",
        "name_layers",
        "output_error",
        "population_statistics",
        "rank_disagreement",
        "revert_sync_batchnorm",
        "sync_batch_norm",
        "unfreeze",
        "using_statistics",
    ]
    assert syncbn.__all__ == sorted(syncbn.__all__)
    assert all(getattr(syncbn, name).__doc__ for name in syncbn.__all__)


def test_the_library_imports_torch_and_the_standard_library_alone() -> None:
    allowed = {"syncbn", "torch", *sys.stdlib_module_names}
    folder = Path(syncbn.__file__).parent
    imported = {name.partition(".")[0] for file in folder.rglob("*.py") for name in _imports(file)}
    assert imported <= allowed


def _imports(file: Path) -> list[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return plain + [node.module or "syncbn" for node in nodes if isinstance(node, ast.ImportFrom)]
