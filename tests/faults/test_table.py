"""The table of faults promises nothing that no test shows."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_fault_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "faults.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    named = re.findall(r"`([\w./]+\.py)::(test_\w+)` \|$", text, re.MULTILINE)
    assert len(named) == len(rows) > 30
    for file, test in named:
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"
