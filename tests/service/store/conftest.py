"""A store in a file of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.store import JobStore
from tests.service.store.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[JobStore]:
    opened = JobStore.open(tmp_path / "jobs.sqlite", clock=clock)
    yield opened
    opened.close()
