"""Group commit: writers that wait at the same moment share one transaction, and so one wait for the disk.

Whoever's turn comes does the work of all who wait behind it, each in a savepoint of its own: what fails fails alone,
and what is answered is on disk. A writer that nobody waits behind pays nothing for it.
Source: DeWitt et al. 1984, "Implementation Techniques for Main Memory Database Systems", section 5.2.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from sqlalchemy import Connection

from service.errors import StoreUnavailable

Transaction = Callable[[], AbstractContextManager[Connection]]

_MOST_AT_ONCE = 64
"""So that the first of them does not wait long for the last."""


class _Waiting:
    """One writer's work, and what came of it."""

    def __init__(self, work: Callable[[Connection], Any]) -> None:
        self.work = work
        self.answer: Any = None
        self.error: Exception | None = None
        self.settled = threading.Event()

    def do(self, connection: Connection) -> None:
        """Do the work inside a savepoint. Raises only where the savepoint itself fails."""
        connection.exec_driver_sql("SAVEPOINT one")
        try:
            self.answer = self.work(connection)
        except Exception as error:
            self.error = error
            connection.exec_driver_sql("ROLLBACK TO one")
        connection.exec_driver_sql("RELEASE one")


class GroupCommit:
    """Transactions for any number of threads; ``turn`` admits one thread at a time, and raises StoreUnavailable."""

    def __init__(self, transaction: Transaction, turn: Callable[[], AbstractContextManager[None]], name: str) -> None:
        self._transaction = transaction
        self._turn = turn
        self._name = name
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []

    def do(self, work: Callable[[Connection], Any], timeout_s: float) -> Any:
        """What ``work`` answers, stored. Raises what it raises, then nothing of it is stored; StoreUnavailable."""
        mine = _Waiting(work)
        with self._lock:
            self._waiting.append(mine)
        try:
            with self._turn():
                self._settle_all(mine)
        except StoreUnavailable:
            if self._withdraw(mine):
                raise
        if not mine.settled.wait(timeout_s):  # another thread is at it
            raise StoreUnavailable(f"{self._name} is busy: what was to be written may be written in a moment, or not")
        if mine.error is not None:
            raise mine.error
        return mine.answer

    def _withdraw(self, mine: _Waiting) -> bool:
        """Whether nobody has begun with it."""
        with self._lock:
            if mine not in self._waiting:
                return False
            self._waiting.remove(mine)
            return True

    def _settle_all(self, mine: _Waiting) -> None:
        """Do all that waits in one transaction, unless another thread has done ``mine`` with its own."""
        with self._lock:
            if mine not in self._waiting:
                return
            others = [waiting for waiting in self._waiting if waiting is not mine][: _MOST_AT_ONCE - 1]
            group = [mine, *others]
            self._waiting = [waiting for waiting in self._waiting if waiting not in group]
        failure: Exception | None = StoreUnavailable(f"{self._name} was given up in the middle of a transaction")
        try:
            self._commit(group)
            failure = None
        except Exception as error:
            failure = error
        finally:
            for waiting in group:
                waiting.error = waiting.error or failure
                waiting.settled.set()

    def _commit(self, group: list[_Waiting]) -> None:
        with self._transaction() as connection:
            if len(group) == 1:
                group[0].answer = group[0].work(connection)
                return
            for waiting in group:
                waiting.do(connection)
