"""When to try again, and when no more: decided here, done elsewhere."""

from dataclasses import dataclass
from datetime import datetime, timedelta


@dataclass(frozen=True)
class Backoff:
    """Waits twice as long after each failure, from ``first_s`` to ``longest_s``, for ``give_up_s`` in all."""

    first_s: float = 5.0
    longest_s: float = 3600.0
    give_up_s: float = 86400.0
    rest_s: float = 60.0
    """A receiver that fails again and again is left alone for at most this long, whatever else it is to be told."""

    def next_try(
        self, num_failures: int, failing_since: datetime | None, now: datetime, jitter: float
    ) -> datetime | None:
        """When to try an event again that has failed ``num_failures`` times before this; None: give up.

        ``jitter``, in [0, 1), takes up to half of the wait away, so that those who failed together do not come back
        together. The last try is made when the time is up.
        """
        since = failing_since or now
        end = since + timedelta(seconds=self.give_up_s)
        if failing_since is not None and now >= end:
            return None
        return min(now + timedelta(seconds=self._wait_s(num_failures) * (1 - jitter / 2)), end)

    def pause_s(self, num_failures: int) -> float:
        """How long a receiver is left alone after ``num_failures`` failures in a row (at least 1)."""
        return min(self._wait_s(num_failures - 1), self.rest_s)

    def _wait_s(self, num_failures: int) -> float:
        return min(self.first_s * 2.0 ** min(num_failures, 60), self.longest_s)
