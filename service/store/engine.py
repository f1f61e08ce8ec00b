"""One database: its transactions, for any number of threads, and its failures. What is special to a kind is elsewhere.

`service.store.sqlite` and `service.store.postgresql` open one each; `service.store.upgrade` brings it up to date.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, IntegrityError, ProgrammingError, SQLAlchemyError

from service.errors import StoreUnavailable


class Database:
    """Transactions over one engine; a failing database raises `StoreUnavailable`.

    ``writing`` is entered around every write transaction; ``remedy`` is said where the database does not answer.
    """

    def __init__(
        self,
        reader: Engine,
        writer: Engine,
        name: str,
        *,
        remedy: str,
        writing: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._name = name
        self._remedy = remedy
        self._writing = writing
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
        with self._answering(), self._writing(), self._writer.connect() as connection, connection.begin():
            yield connection

    def close(self) -> None:
        """Give back every connection; later calls raise `StoreUnavailable`."""
        self._closed = True
        self._reader.dispose()
        self._writer.dispose()

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
    except (IntegrityError, ProgrammingError):
        raise
    except SQLAlchemyError as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        raise StoreUnavailable(f"{name} does not answer: {str(cause).strip()}; {remedy}") from error
