"""What tests of the service share: one real PostgreSQL server, started by the first that asks."""

from collections.abc import Iterator

import pytest

from tests.postgresql import PostgresServer


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresServer]:
    """A server for the whole session (of each process, under ``pytest -n``)."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.remove()
