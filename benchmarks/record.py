"""How a benchmark tells its figures: a table for people, a JSON file beside it to compare with later."""

import json
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median with quartiles, extremes and count."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": middle,
        "lower_quartile": low,
        "upper_quartile": high,
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def record(name: str, figures: Mapping[str, Any], suffix: str = "", **circumstances: Any) -> None:
    """Print the figures and write ``results/<name><suffix>.json`` with the machine, the date and the command."""
    entry = {
        "benchmark": name + suffix,
        "command": f"python -m benchmarks.{name} {' '.join(sys.argv[1:])}".strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "circumstances": circumstances,
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}{suffix}.json").write_text(json.dumps(entry, indent=2) + "\n")
    print(json.dumps(entry, indent=2))


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    packages = {name: version(name) for name in ("torch", "ray", "fastapi", "sqlalchemy")}
    return {
        "cpu": cpu,
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "load_average_before": psutil.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **packages,
    }
