"""How often may be asked: counted in this process, per principal, and per address where no right key is shown."""

import math
import time
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter


@dataclass(frozen=True)
class RateLimits:
    """Rates as words, such as ``100/second`` or ``20/minute``."""

    requests: str = "6000/minute"
    """Of one principal."""
    refusals: str = "30/minute"
    """Of one address, for want of a right key."""


@dataclass(frozen=True)
class Standing:
    """Where someone stands against a limit; ``policy`` names it."""

    policy: str
    allowed: bool
    quota: int
    window_s: int
    remaining: int
    reset_s: int
    """Seconds, rounded up, until the window lets more pass."""

    @property
    def headers(self) -> dict[str, str]:
        """As HTTP fields: draft-ietf-httpapi-ratelimit-headers-10, sections 3 and 4."""
        return {
            "RateLimit-Policy": f'"{self.policy}";q={self.quota};w={self.window_s}',
            "RateLimit": f'"{self.policy}";r={self.remaining};t={self.reset_s}',
        }


class Rate:
    """One limit for any number of names, in constant memory for each.

    Two counters, of this window and the one before weighed by how much of it still counts: a burst at a window's
    border cannot pass twice. Each process counts for itself. Raises: ValueError for a rate that is none.
    """

    def __init__(self, policy: str, rate: str) -> None:
        self._policy = policy
        self._item: RateLimitItem = parse(rate)
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def take(self, name: str) -> Standing:
        """Count one for ``name``, unless the limit is reached."""
        return self._standing(name, self._limiter.hit(self._item, name))

    def look(self, name: str) -> Standing:
        """Whether one more would pass; counts nothing."""
        return self._standing(name, self._limiter.test(self._item, name))

    def _standing(self, name: str, allowed: bool) -> Standing:
        stats = self._limiter.get_window_stats(self._item, name)
        reset_s = max(math.ceil(stats.reset_time - time.time()), 0 if allowed else 1)
        return Standing(self._policy, allowed, self._item.amount, self._item.get_expiry(), stats.remaining, reset_s)


def neighbourhood(address: str) -> str:
    """What counts as one address: an IPv6 caller commands a whole /64 and could show another face each time."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, IPv6Address):
        return str(parsed.ipv4_mapped or ip_network((parsed, 64), strict=False))
    return address
