"""Writers that come at once share a transaction, and nothing else."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Connection, event
from sqlalchemy.exc import IntegrityError

from service.errors import StoreUnavailable
from service.store.engine import Database
from service.store.sqlite import open_sqlite

WRITERS = 20


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = open_sqlite(tmp_path / "jobs.sqlite", busy_timeout_s=30)
    with opened.write() as connection:
        connection.exec_driver_sql("CREATE TABLE seats (number INTEGER PRIMARY KEY)")
    yield opened
    opened.close()


def seats(database: Database) -> list[int]:
    with database.read() as connection:
        return list(connection.exec_driver_sql("SELECT number FROM seats ORDER BY number").scalars())


def wait_for(database: Database, num_writers: int) -> None:
    deadline = time.monotonic() + 30
    while len(database._group._waiting) < num_writers:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def take(number: int) -> Callable[[Connection], int]:
    def work(connection: Connection) -> int:
        connection.exec_driver_sql("INSERT INTO seats VALUES (?)", (number,))
        if number % 5 == 0:
            raise ValueError(f"{number} is reserved")
        return number

    return work


def test_those_who_wait_are_stored_together_and_fail_alone(database: Database) -> None:
    """One holds the turn until all others wait: they take one commit, and none sees another's failure."""
    commits: list[str] = []
    event.listen(database._writer, "commit", lambda connection: commits.append("commit"))
    with ThreadPoolExecutor(WRITERS + 2) as pool:
        with database.write() as connection:
            wishes = [pool.submit(database.transact, take(number)) for number in range(1, WRITERS + 1)]
            twice = pool.submit(database.transact, take(21))
            again = pool.submit(database.transact, take(21))
            wait_for(database, WRITERS + 2)
            connection.exec_driver_sql("INSERT INTO seats VALUES (100)")
        for number, wish in enumerate(wishes, start=1):
            if number % 5 == 0:
                with pytest.raises(ValueError, match=f"{number} is reserved"):
                    wish.result(30)
            else:
                assert wish.result(30) == number
        outcomes = [wish.exception(30) for wish in (twice, again)]
    assert [type(outcome) for outcome in outcomes if outcome is not None] == [IntegrityError]
    assert seats(database) == [number for number in range(1, 22) if number % 5] + [100]
    assert len(commits) == 2


def test_a_commit_that_fails_fails_for_all_whom_it_would_have_stored(database: Database) -> None:
    with ThreadPoolExecutor(3) as pool:
        with database.write():
            wishes = [pool.submit(database.transact, work) for work in (take(1), take(2), _end_the_transaction)]
            wait_for(database, 3)
        errors = [wish.exception(30) for wish in wishes]
    assert [type(error) for error in errors] == [StoreUnavailable, StoreUnavailable, ValueError]
    assert seats(database) == []
    assert database.transact(take(3)) == 3


def _end_the_transaction(connection: Connection) -> None:
    """As SQLite does by itself where its disk is full."""
    connection.exec_driver_sql("ROLLBACK")
    raise ValueError("the disk is full")


def test_who_waits_too_long_writes_nothing_later(tmp_path: Path) -> None:
    database = open_sqlite(tmp_path / "jobs.sqlite", busy_timeout_s=0.2)
    try:
        with database.write() as connection:
            connection.exec_driver_sql("CREATE TABLE seats (number INTEGER PRIMARY KEY)")
        with ThreadPoolExecutor(1) as pool, database.write(), pytest.raises(StoreUnavailable, match="busy"):
            pool.submit(database.transact, take(1)).result(30)
        assert database.transact(take(2)) == 2
        assert seats(database) == [2]
    finally:
        database.close()
