"""A store of each test's own, on both databases."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from service.store import JobStore
from service.store.schema import metadata, schema_version
from tests.postgresql import PostgresServer
from tests.service.store.clock import Clock

# Row by row, without the triggers that guard some: of a few rows that takes a tenth of the time of TRUNCATE.
_FORGET_EVERYTHING = "; ".join(
    ["SET session_replication_role = replica"]
    + [f"DELETE FROM {name}" for name in metadata.tables if name != schema_version.name]
)

OpenStore = Callable[[], JobStore]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def shared_database(postgresql: PostgresServer) -> str:
    """A database that tests use one after the other; `open_store` empties it again."""
    return postgresql.new_database()


@pytest.fixture(params=["sqlite", "postgresql"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[OpenStore]:
    """Opens stores on one database, each as another service would; they are closed at the test's end."""
    with ExitStack() as stack:
        if request.param == "postgresql":
            server: PostgresServer = request.getfixturevalue("postgresql")
            database: str = request.getfixturevalue("shared_database")
            stack.callback(server.execute, _FORGET_EVERYTHING, database)

        def open_one() -> JobStore:
            if request.param == "sqlite":
                opened = JobStore.open(tmp_path / "jobs.sqlite", clock=clock)
            else:
                opened = JobStore.connect(server.url(database), clock=clock)
            stack.callback(opened.close)
            return opened

        yield open_one


@pytest.fixture
def store(open_store: OpenStore) -> JobStore:
    return open_store()
