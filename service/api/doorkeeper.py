"""Tells by the key that a request shows who is asking."""

import hashlib
import hmac
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime

from anyio.to_thread import run_sync
from pydantic import SecretStr

from service.errors import Unauthorized
from service.jobs import ADMIN, ANONYMOUS, Caller
from service.store import JobStore

_REFUSAL = (
    "this service needs a key, as a bearer token: one that an admin has made (`syncbn keys create` on its machine), "
    "or its own SYNCBN_API_TOKEN"
)


REMEMBERED_S = 5.0
"""How soon is noticed what another process has changed of keys and principals; what this one changes, at once."""

_NUM_REMEMBERED = 1024


@dataclass(frozen=True)
class _Known:
    """Someone who was let in, when, and after how many changes of keys and principals."""

    caller: Caller
    at: float
    num_changes: tuple[int, int]


class Doorkeeper:
    """Knows the stored keys, and the token of the service's operator where one is set.

    A service with neither, on loopback alone, is open: everyone there could change its files anyway. From the first
    key on, keys are asked for, even when all of them have ended. Whoever was let in is remembered for a few seconds,
    1,024 at most, by the SHA-256 of what they showed; refusals are not remembered.
    """

    def __init__(self, store: JobStore, operator_token: SecretStr | None, remembered_s: float = REMEMBERED_S) -> None:
        self._store = store
        self._operator_token = operator_token
        self._keys_made = False
        self._remembered_s = remembered_s
        self._known: OrderedDict[bytes, _Known] = OrderedDict()

    def recall(self, key: str | None) -> Caller | None:
        """Who showed ``key`` just now, where nothing has changed since; costs no look into the database.

        Only for one event loop: what is remembered has no lock.
        """
        known = self._known.get(_digest(key))
        if known is None or known.num_changes != self._num_changes:
            return None
        expires_at = None if known.caller.key is None else known.caller.key.expires_at
        if time.monotonic() >= known.at + self._remembered_s or (expires_at and expires_at <= datetime.now(UTC)):
            return None
        return known.caller

    async def identify_and_remember(self, key: str | None, try_token: bool = True) -> Caller:
        """As `identify` does, in a worker thread, for `recall`. Raises Unauthorized."""
        at, num_changes = time.monotonic(), self._num_changes
        caller = await run_sync(self.identify, key, try_token)
        self._known[_digest(key)] = _Known(caller, at, num_changes)
        self._known.move_to_end(_digest(key))
        while len(self._known) > _NUM_REMEMBERED:
            self._known.popitem(last=False)
        return caller

    def identify(self, key: str | None, try_token: bool = True) -> Caller:
        """Who shows ``key``; the operator's token is not looked at unless ``try_token``. Raises Unauthorized.

        Stored keys are 256 random bits, which nobody guesses; the operator's token is what a person chose.
        """
        if self.open:
            return Caller(principal=self._store.principals.get(ANONYMOUS))
        if key is None:
            raise Unauthorized(_REFUSAL)
        if try_token and self._is_operator(key):
            return Caller(principal=self._store.principals.get(ADMIN))
        try:
            return self._store.keys.identify(key)
        except Unauthorized as error:
            raise Unauthorized(f"{error}; {_REFUSAL}") from error

    def admit_attempt(self, attempt_id: str, token: str | None) -> None:
        """Return if the token is the one with which this attempt reports. Raises Unauthorized."""
        self._store.authorize(attempt_id, token or "")

    @property
    def open(self) -> bool:
        """Whether whoever asks is let in, because there are no keys."""
        if self._operator_token is None and not self._keys_made:
            self._keys_made = self._store.keys.any_made()  # asked until it is so; then it stays so
        return self._operator_token is None and not self._keys_made

    @property
    def _num_changes(self) -> tuple[int, int]:
        return self._store.keys.num_changes, self._store.principals.num_changes

    def _is_operator(self, key: str) -> bool:
        if self._operator_token is None:
            return False
        expected = self._operator_token.get_secret_value().encode()
        return hmac.compare_digest(key.encode("utf-8", "surrogateescape"), expected)


def _digest(key: str | None) -> bytes:
    return b"" if key is None else hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
