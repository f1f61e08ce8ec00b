"""What the documents promise exists: the tests they name, the files they link to, the settings they list."""

import ast
import re
from pathlib import Path

import pytest

from service.settings import ClientSettings, Settings

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])


def test_every_row_about_the_layer_names_a_test_that_exists() -> None:
    named = re.findall(r"`([\w./]+\.py)::(test_\w+)`", (ROOT / "docs" / "layer.md").read_text())
    assert len(named) > 30
    for file, test in named:
        tree = ast.parse((ROOT / "tests" / "syncbn" / file).read_text())
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"


def test_every_answer_to_a_threat_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    _, rows, _ = re.split(r"^## (?:Threats, .*|The record)$", text, flags=re.MULTILINE)
    threats = re.findall(r"^\| (?!threat|-)(.+) \| (.+) \| `([\w./]+\.py)::(test_\w+)` \|$", rows, re.MULTILINE)
    assert len(threats) == rows.count("\n| ") - 1 > 30  # every row but the heading, and the line below it
    for _, _, file, test in threats:
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_within_the_project_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert missing == []


def test_every_setting_is_documented_and_every_documented_one_exists() -> None:
    existing = {f"SYNCBN_{name.upper()}" for name in [*Settings.model_fields, *ClientSettings.model_fields]}
    assert set(re.findall(r"SYNCBN_[A-Z_]+", (ROOT / "docs" / "service.md").read_text())) == existing
