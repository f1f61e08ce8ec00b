"""Of several services on one database, one schedules, and one delivers: this keeps the lease that says which."""

import os
import secrets
import socket
import time

import structlog

from service.store import JobStore, Lease

LEASE = "scheduler"

_log = structlog.get_logger("scheduler")


class Leadership:
    """The lease ``name`` under which a scheduler writes; taken when it is free, renewed at a third of its time.

    ``holder`` names this service. Two that are never there at once, because a lock of the system forbids it, may
    share a name: the second then goes on at once, and needs not wait for the lease of the first to expire.
    """

    def __init__(self, store: JobStore, holder: str | None = None, ttl_s: float = 10.0, *, name: str = LEASE) -> None:
        self._store = store
        self._name = name
        self._holder = holder or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._ttl_s = ttl_s
        self._lease: Lease | None = None
        self._asked_at = float("-inf")

    @property
    def lease(self) -> Lease | None:
        """The lease, as far as this service knows: the store judges each write that carries it."""
        return self._lease

    def hold(self) -> bool:
        """Take the lease, or renew it where that is due. False while another service has it.

        Raises: StoreUnavailable.
        """
        if time.monotonic() - self._asked_at < self._ttl_s / 3:
            return self._lease is not None
        asked_at = time.monotonic()
        if self._lease is not None and not self._store.renew_lease(self._lease, self._ttl_s):
            self.lose()
        if self._lease is None:
            self._lease = self._store.acquire_lease(self._name, self._holder, self._ttl_s)
            if self._lease is not None:
                _log.info("the lease is ours", lease=self._name, holder=self._holder, token=self._lease.token)
        self._asked_at = asked_at
        return self._lease is not None

    def lose(self) -> None:
        """Know that another service has the lease by now."""
        _log.warning("the lease is another's", lease=self._name, holder=self._holder)
        self._lease = None

    def release(self) -> None:
        """Let another service take over at once. Raises: StoreUnavailable."""
        if self._lease is not None:
            self._store.release_lease(self._lease)
            self._lease = None
