"""When something about an attempt was last seen to change: its step, its heartbeat."""

from collections.abc import Collection
from datetime import datetime


class Sightings:
    """Remembers per attempt the newest value and when it was first seen; a new scheduler begins anew.

    All by the scheduler's own clock: what it compares is never told by another machine, nor by a clock of before it
    was set.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[object, datetime]] = {}

    def since(self, attempt_id: str, value: object, now: datetime) -> datetime:
        """When ``value`` was first seen: ``now`` if it is new."""
        if attempt_id not in self._seen or self._seen[attempt_id][0] != value:
            self._seen[attempt_id] = (value, now)
        return self._seen[attempt_id][1]

    def forget_all_but(self, attempt_ids: Collection[str] = ()) -> None:
        """Drop what is known of other attempts."""
        self._seen = {name: seen for name, seen in self._seen.items() if name in attempt_ids}
