"""One database: its transactions, for any number of threads, and its failures. What is special to a kind is elsewhere.

`service.store.sqlite` and `service.store.postgresql` open one each; `service.store.upgrade` brings it up to date.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError, SQLAlchemyError

from service.errors import StoreUnavailable
from service.store.group_commit import GroupCommit

MAX_TRIES = 3
"""How often a write is tried that the database gives up so that another can go on."""

_GAVE_WAY = frozenset({"40001", "40P01"})
"""SQLSTATE of a serialization failure and of a deadlock: nothing of the transaction has happened."""

_Answer = TypeVar("_Answer")


class Database:
    """Transactions over one engine; a failing database raises `StoreUnavailable`.

    ``writing`` is entered around every write transaction; ``remedy`` is said where the database does not answer. With
    ``group_timeout_s`` writers that wait for one another share transactions; see `service.store.group_commit`.
    A server's answer to a commit may be lost on its way; then, and only then, the error does not tell whether the
    transaction was stored. Every write of ours can be asked for again: it compares before it sets, or knows its key.
    """

    def __init__(
        self,
        reader: Engine,
        writer: Engine,
        name: str,
        *,
        remedy: str,
        writing: Callable[[], AbstractContextManager[None]] = nullcontext,
        group_timeout_s: float | None = None,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._name = name
        self._remedy = remedy
        self._writing = writing
        self._group_timeout_s = group_timeout_s
        self._group = GroupCommit(self._transaction, writing, name)
        self._closed = False

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One consistent view of the whole database."""
        with self._answering(), self._reader.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction: all of it is stored, or nothing.

        On SQLite there is no other writer meanwhile. On PostgreSQL there may be: each statement sees what is
        committed by then, and whoever reads before it writes locks what it reads (``with_for_update``, or
        `service.store.locks`), the lease first, then jobs in the order of their ids, then what hangs on them.
        """
        with self._writing(), self._transaction() as connection:
            yield connection

    def transact(self, work: Callable[[Connection], _Answer]) -> _Answer:
        """What ``work`` answers, all of it stored in one transaction of `write`, or nothing.

        Where the database gives the transaction up to resolve a deadlock, ``work`` is done anew from its beginning,
        at most `MAX_TRIES` times in all; so it must do nothing but read and write this connection.
        """
        if self._group_timeout_s is not None:
            answer: _Answer = self._group.do(partial(self._do, work), self._group_timeout_s)
            return answer
        for _ in range(MAX_TRIES - 1):
            try:
                with self.write() as connection:
                    return work(connection)
            except StoreUnavailable as error:
                if not _gave_way(error.__cause__):
                    raise
        with self.write() as connection:
            return work(connection)

    def close(self) -> None:
        """Give back every connection; later calls raise `StoreUnavailable`."""
        self._closed = True
        self._reader.dispose()
        self._writer.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with self._answering(), self._writer.connect() as connection, connection.begin():
            yield connection

    def _do(self, work: Callable[[Connection], _Answer], connection: Connection) -> _Answer:
        with self._answering():
            return work(connection)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        if self._closed:
            raise StoreUnavailable(f"{self._name} is closed")
        with answering(self._name, self._remedy):
            yield


@contextmanager
def answering(name: str, remedy: str) -> Iterator[None]:
    """Tell what the database ``name`` could not do as `StoreUnavailable`; our own mistakes stay what they are."""
    try:
        yield
    except (DataError, IntegrityError, ProgrammingError):
        raise
    except SQLAlchemyError as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        raise StoreUnavailable(f"{name} does not answer: {' '.join(str(cause).split())}; {remedy}") from error


def _gave_way(error: BaseException | None) -> bool:
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) in _GAVE_WAY
