"""Who may import whom: the arrows between the parts, read from the source itself."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT: dict[str, set[str]] = {
    "syncbn": {"torch"},
    "service/errors.py": set(),
    "service/settings.py": {"pydantic", "pydantic_settings"},
    "service/lock.py": {"service.errors"},
    "service/exposure.py": {"service.settings", "service.errors"},
    "service/confinement.py": {"service.jobs", "service.errors"},
    "service/log.py": {"structlog"},
    "service/planner.py": {"service.jobs", "service.errors"},
    "service/jobs": {"pydantic", "pydantic_core"},
    "service/reports": {"service.jobs", "numpy", "scipy"},
    "service/store": {"service.jobs", "service.errors", "pydantic", "sqlalchemy", "alembic", "numpy"},
    "service/scheduler": {
        "service.jobs",
        "service.errors",
        "service.store",
        "service.reports",
        "pydantic",
        "structlog",
    },
    "service/webhooks": {
        "service.jobs",
        "service.errors",
        "service.store",
        "service.scheduler.leadership",
        "pydantic",
        "httpx2",
        "structlog",
    },
    "service/training": {"syncbn", "service.jobs", "torch", "numpy", "pydantic"},
    "service/cluster": {
        "service.jobs",
        "service.errors",
        "service.training",
        "service.scheduler.launcher",
        "pydantic",
        "httpx2",
        "psutil",
        "ray",
        "torch",
    },
    "service/api": {
        "service.confinement",
        "service.jobs",
        "service.errors",
        "service.store",
        "service.reports",
        "fastapi",
        "starlette",
        "pydantic",
        "pydantic_core",
        "anyio",
        "limits",
        "opentelemetry",
        "prometheus_client",
        "structlog",
    },
    "service/client.py": {"service.jobs", "service.errors", "pydantic", "httpx2"},
    "service/display.py": {"service.jobs", "service.errors", "service.client", "service.doctor", "rich"},
    "service/report_page": {"service.client", "service.jobs", "numpy", "matplotlib", "jinja2"},
    "service/__main__.py": {"service.commands"},
    "service/commands": {
        "service.jobs",
        "service.errors",
        "service.client",
        "service.composition",
        "service.display",
        "service.doctor",
        "service.lock",
        "service.log",
        "service.memory",
        "service.report_page",
        "service.settings",
        "service.store",
        "pydantic",
        "rich",
        "typer",
    },
    "service/housekeeping.py": {"service.errors", "service.store", "structlog"},
    "service/memory.py": {"service.errors", "service.settings", "service.store"},
    "service/doctor": {
        "service.client",
        "service.cluster",
        "service.errors",
        "service.exposure",
        "service.memory",
        "service.settings",
        "service.store",
        "service.webhooks",
        "pydantic",
        "torch",
    },
    "service/demo.py": {"service.jobs", "service.errors", "service.client", "service.display", "rich"},
}
"""Each part and what it may import beside the standard library and itself."""

JOINS_EVERYTHING = {"service/composition.py", "service/__init__.py"}


def imports(path: Path) -> Iterator[str]:
    """Every absolute module name that a file imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            is_package = (ROOT / str(node.module).replace(".", "/")).is_dir()
            yield from names if node.module == "service" and is_package else [str(node.module)]


def allowed(module: str, part: str) -> bool:
    """Whether ``part`` may import ``module``."""
    own = part.removesuffix(".py").replace("/", ".")
    names = MAY_IMPORT[part] | {own}
    top = module.partition(".")[0]
    return top in sys.stdlib_module_names or any(module == n or module.startswith(n + ".") for n in names)


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_a_part_imports_only_what_its_place_in_the_house_allows(part: str) -> None:
    place = ROOT / part
    files = [place] if place.suffix else sorted(place.rglob("*.py"))
    assert files
    wrong = [f"{f.relative_to(ROOT)}: {m}" for f in files for m in imports(f) if not allowed(m, part)]
    assert not wrong


def test_every_source_file_has_its_place_in_the_house() -> None:
    homeless = [
        str(file)
        for file in (path.relative_to(ROOT) for top in ("syncbn", "service") for path in (ROOT / top).rglob("*.py"))
        if str(file) not in JOINS_EVERYTHING and not any(str(file).startswith(part) for part in MAY_IMPORT)
    ]
    assert not homeless


def test_only_settings_reads_the_environment_for_choices() -> None:
    allowed_readers = {
        "service/settings.py",
        "service/demo.py",  # passes it on, less the service's own variables
        "service/cluster/runner.py",  # its command line is the environment that the launcher set
        "service/cluster/head.py",  # passes it on to the keeper
        "service/cluster/keeper.py",  # passes it on to Ray
    }
    readers = {
        str(file.relative_to(ROOT))
        for top in ("syncbn", "service")
        for file in (ROOT / top).rglob("*.py")
        if "os.environ" in file.read_text() or "getenv" in file.read_text()
    }
    assert readers <= allowed_readers


def test_the_forbidden_import_would_be_seen() -> None:
    assert not allowed("torch", "service/api")
    assert not allowed("ray", "service/scheduler")
    assert not allowed("service.store", "service/training")
    assert allowed("service.jobs.spec", "service/api")


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        ("service.jobs, service.reports, service.store, service.scheduler, service.api, service.client", "torch ray"),
        ("service.webhooks", "torch ray fastapi"),
        ("service.training.loop, service.training.__main__", "fastapi sqlalchemy ray httpx2"),
        ("service.cluster.runner", "fastapi sqlalchemy"),
        ("service.commands", "torch ray fastapi sqlalchemy matplotlib jinja2"),
        ("syncbn", "numpy.random pydantic service ray"),
    ],
)
def test_importing_a_part_does_not_load_what_its_machine_may_lack(modules: str, forbidden: str) -> None:
    program = f"import sys, {modules}; print([m for m in '{forbidden}'.split() if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "[]"
