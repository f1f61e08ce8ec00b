"""Forgetting by itself: what has been kept long enough goes at the start of the service, and every few hours then.

Of several services on one database one does it each time: whoever gets the lease, which lasts until the next time. Of
one that died in between, the next ends what it began; see `service.store.retention`.
"""

import threading
from collections.abc import Callable

import structlog

from service.errors import StoreUnavailable
from service.store import JobStore, Retention

LEASE = "housekeeping"

_NEXT_TRY_S = 60.0
"""How soon after the database did not answer."""

_log = structlog.get_logger("service")


class Housekeeper:
    """One for each service, which ``holder`` names; what is None is kept for ever."""

    def __init__(
        self, store: JobStore, policy: Retention, audit_days: float | None, *, every_s: float, holder: str
    ) -> None:
        self._store = store
        self._policy = policy
        self._audit_days = audit_days
        self._every_s = every_s
        self._holder = holder

    def run(self, stopping: threading.Event) -> None:
        """Tidy now, and again whenever it is time, until ``stopping`` is set."""
        pause_s = 0.0
        while not stopping.wait(pause_s):
            try:
                self.tidy(stopping.is_set)
                pause_s = self._every_s
            except StoreUnavailable as error:
                _log.warning("nothing could be forgotten", error=str(error))
                pause_s = min(_NEXT_TRY_S, self._every_s)

    def tidy(self, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Forget what has been kept long enough, if it is this service's turn; whether it was.

        Cost: two queries where there is nothing to forget. Raises: StoreUnavailable.
        """
        if self._store.acquire_lease(LEASE, self._holder, self._every_s) is None:
            return False
        forgotten = {str(what): count for what, count in self._store.forget(self._policy, interrupted).items() if count}
        if forgotten:
            _log.info("forgot what jobs had told", **forgotten)
        if self._audit_days is not None and (removed := self._store.audit.trim(self._audit_days, interrupted)):
            _log.info("removed old entries of the audit trail", entries=removed)
        return True
