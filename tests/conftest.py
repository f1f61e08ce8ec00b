"""What tests of several parts share: one real Ray head for the whole session."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from service.cluster.head import LocalRayHead
from service.cluster.head_record import read_record

# How long an example takes says nothing about it on a machine that other tests share.
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under ``pytest -n`` all tests that start Ray share one process: they share its heads, and are slow enough."""
    for item in items:
        if starts_ray(item):
            item.add_marker(pytest.mark.xdist_group("ray"))


def starts_ray(item: pytest.Item) -> bool:
    """Whether the test may start Ray, by where it is."""
    return item.path.parts[-2] == "e2e" or item.path.parts[-3:-1] == ("service", "cluster")


@pytest.fixture(scope="session", autouse=True)
def compiler_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep torch's compiler, which makes its folder already when it is imported, to a folder that goes again."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRayHead]:
    """A local Ray head with 4 logical CPUs, started by the first test that asks and ended after the last."""
    head = LocalRayHead(tmp_path_factory.mktemp("ray-head"), num_cpus=4, start_timeout_s=110.0)
    try:
        head.ensure()
        record = read_record(head.state_dir / "head.json")
        yield head
    finally:
        head.stop()
    assert record is not None
    assert record.processes() == []
    assert not Path(record.temp_dir).exists()
