"""The time of the day, and whether someone has set it."""

import time
from collections.abc import Callable
from datetime import UTC, datetime

_TOLERANCE_S = 1.0
"""Clocks that are steered, rather than set, move less than this from one look to the next."""


def utc_now() -> datetime:
    """The time of the system, aware."""
    return datetime.now(UTC)


class WallClock:
    """Reads ``clock`` beside the monotonic one, which nobody sets and which stands still while the machine sleeps."""

    def __init__(self, clock: Callable[[], datetime] = utc_now) -> None:
        self._clock = clock
        self._lead_s = self._lead()

    def now(self) -> datetime:
        """The time of the day."""
        return self._clock()

    def was_set(self) -> bool:
        """Whether since the last question it went otherwise than time does: set, either way, or slept through."""
        before, self._lead_s = self._lead_s, self._lead()
        return abs(self._lead_s - before) > _TOLERANCE_S

    def _lead(self) -> float:
        return self._clock().timestamp() - time.monotonic()
