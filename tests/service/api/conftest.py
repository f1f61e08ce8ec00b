"""An API over a store in a file of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from service.store import JobStore
from tests.service.api.house import House


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    store = JobStore.open(tmp_path / "jobs.sqlite")
    yield House(store, storage=tmp_path)
    store.close()


@pytest.fixture
def client(house: House) -> Iterator[TestClient]:
    with house.client() as opened:
        yield opened
