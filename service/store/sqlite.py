"""A database in one file, for one service. All that is special to SQLite is here.

Write-ahead logging lets readers go on while one writes. ``synchronous=FULL`` waits for the disk at each commit,
because an answered request is a promise: a runner forgets what the service has taken, and a submitted job exists.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Pool, create_engine, event
from sqlalchemy.pool import NullPool, QueuePool

from service.errors import StoreUnavailable
from service.store.engine import Database, answering
from service.store.upgrade import bring_up_to_date, is_up_to_date

_REMEDY = "is its disk full or locked?"


def open_sqlite(path: Path, busy_timeout_s: float) -> Database:
    """The database in the file ``path``, made or upgraded if need be, readable by its owner alone.

    Raises: StoreUnavailable where the file cannot be used, or was written by a newer service.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError as error:
        raise StoreUnavailable(f"cannot write {path}: {error.strerror}; choose another SYNCBN_DATA_DIR") from error
    # The pool never waits: how many threads there are bounds how many connections there are.
    reader = create_engine(f"sqlite:///{path}", poolclass=QueuePool, pool_size=8, max_overflow=-1)
    _configure(reader, busy_timeout_s)
    writer = reader.execution_options(syncbn_write=True)
    writing = _one_at_a_time(str(path), busy_timeout_s)
    database = Database(reader, writer, str(path), remedy=_REMEDY, writing=writing, group_timeout_s=busy_timeout_s)
    try:
        with database.read() as connection:
            up_to_date = is_up_to_date(connection)
        if not up_to_date:
            _upgrade(path, busy_timeout_s)
    except BaseException:
        database.close()
        raise
    return database


def _one_at_a_time(name: str, timeout_s: float) -> Callable[[], AbstractContextManager[None]]:
    """Writers of this process queue here; SQLite's own wait polls, and may starve one of them."""
    turn = threading.Lock()

    @contextmanager
    def writing() -> Iterator[None]:
        if not turn.acquire(timeout=timeout_s):
            raise StoreUnavailable(f"{name} is busy: waited {timeout_s:g} s for another writer")
        try:
            yield
        finally:
            turn.release()

    return writing


def _configure(engine: Engine, busy_timeout_s: float, foreign_keys: str = "ON") -> None:
    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver shall begin nothing of its own
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {int(busy_timeout_s * 1000)}")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute(f"PRAGMA foreign_keys = {foreign_keys}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writing = connection.get_execution_options().get("syncbn_write", False)
        # A transaction that reads first and writes later could otherwise fail in the middle.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _upgrade(path: Path, busy_timeout_s: float) -> None:
    """All steps in one transaction. A table that is made anew is dropped meanwhile, so keys are checked at the end."""
    pool: type[Pool] = NullPool
    engine = create_engine(f"sqlite:///{path}", poolclass=pool, execution_options={"syncbn_write": True})
    _configure(engine, busy_timeout_s, foreign_keys="OFF")
    with answering(str(path), _REMEDY), engine.connect() as connection, connection.begin():
        bring_up_to_date(connection, str(path), "SYNCBN_DATA_DIR")
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
        if broken:
            raise StoreUnavailable(f"{path} has {len(broken)} rows that belong to nothing; nothing was changed")
