"""One database: its connections, its transactions, its failures. All that is special to SQLite is here.

Write-ahead logging lets readers go on while one writes. ``synchronous=FULL`` waits for the disk at each commit,
because an answered request is a promise: a runner forgets what the service has taken, and a submitted job exists.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, insert, select
from sqlalchemy.exc import DBAPIError, IntegrityError, ProgrammingError, SQLAlchemyError
from sqlalchemy.pool import QueuePool

from service.errors import StoreUnavailable
from service.store.schema import SCHEMA_VERSION, metadata, schema_version


class Database:
    """Transactions over one engine, for any number of threads; a failing database raises `StoreUnavailable`."""

    def __init__(self, engine: Engine, name: str, busy_timeout_s: float) -> None:
        self._engine = engine
        self._name = name
        self._busy_timeout_s = busy_timeout_s
        # Writers of this process queue here; SQLite's own wait polls, and may starve one of them.
        self._writing = threading.Lock()
        self._closed = False

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One consistent view of the whole database."""
        with self._answering(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that sees no other writer; all of it is stored, or nothing."""
        with self._answering():
            if not self._writing.acquire(timeout=self._busy_timeout_s):
                raise StoreUnavailable(f"{self._name} is busy: waited {self._busy_timeout_s:g} s for another writer")
            try:
                with self._engine.connect() as connection:
                    connection = connection.execution_options(syncbn_write=True)
                    with connection.begin():
                        yield connection
            finally:
                self._writing.release()

    def close(self) -> None:
        """Give back every connection; later calls raise `StoreUnavailable`."""
        self._closed = True
        self._engine.dispose()

    @contextmanager
    def _answering(self) -> Iterator[None]:
        if self._closed:
            raise StoreUnavailable(f"{self._name} is closed")
        try:
            yield
        except (IntegrityError, ProgrammingError):
            raise  # a mistake of ours, not of the database
        except (DBAPIError, SQLAlchemyError) as error:
            cause = error.orig if isinstance(error, DBAPIError) else error
            raise StoreUnavailable(f"{self._name} does not answer: {cause}; is its disk full or locked?") from error


def open_sqlite(path: Path, busy_timeout_s: float) -> Database:
    """The database in the file ``path``, made if missing, readable by its owner alone.

    Raises: StoreUnavailable where the file cannot be used, or was written by another version of the service.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError as error:
        raise StoreUnavailable(f"cannot write {path}: {error.strerror}; choose another SYNCBN_DATA_DIR") from error
    # The pool never waits: how many threads there are bounds how many connections there are.
    engine = create_engine(f"sqlite:///{path}", poolclass=QueuePool, pool_size=8, max_overflow=-1)
    _configure_sqlite(engine, busy_timeout_s)
    database = Database(engine, str(path), busy_timeout_s)
    try:
        _prepare_schema(database, path)
    except BaseException:
        database.close()
        raise
    return database


def _configure_sqlite(engine: Engine, busy_timeout_s: float) -> None:
    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver shall begin nothing of its own
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {int(busy_timeout_s * 1000)}")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writing = connection.get_execution_options().get("syncbn_write", False)
        # A transaction that reads first and writes later could otherwise fail in the middle.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _prepare_schema(database: Database, path: Path) -> None:
    with database.write() as connection:
        metadata.create_all(connection, tables=[schema_version])
        version = connection.execute(select(schema_version.c.version)).scalar()
        if version is None:
            metadata.create_all(connection)
            connection.execute(insert(schema_version).values(version=SCHEMA_VERSION))
        elif version != SCHEMA_VERSION:
            raise StoreUnavailable(
                f"{path} has schema version {version}, this service knows version {SCHEMA_VERSION}; "
                "run the service that wrote it, or choose another SYNCBN_DATA_DIR"
            )
