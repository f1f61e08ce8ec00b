"""Tells by the key that a request shows who is asking."""

import hmac

from pydantic import SecretStr

from service.errors import Unauthorized
from service.jobs import ADMIN, ANONYMOUS, Caller
from service.store import JobStore

_REFUSAL = (
    "this service needs a key, as a bearer token: one that an admin has made (`syncbn keys create` on its machine), "
    "or its own SYNCBN_API_TOKEN"
)


class Doorkeeper:
    """Knows the stored keys, and the token of the service's operator where one is set.

    A service with neither, on loopback alone, is open: everyone there could change its files anyway. From the first
    key on, keys are asked for, even when all of them have ended.
    """

    def __init__(self, store: JobStore, operator_token: SecretStr | None) -> None:
        self._store = store
        self._operator_token = operator_token
        self._keys_made = False

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

    def _is_operator(self, key: str) -> bool:
        if self._operator_token is None:
            return False
        expected = self._operator_token.get_secret_value().encode()
        return hmac.compare_digest(key.encode("utf-8", "surrogateescape"), expected)
