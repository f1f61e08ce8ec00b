"""When each attempt was last seen to have taken a step."""

from collections.abc import Collection
from datetime import datetime

from service.jobs import Attempt, attempt_id


class Stepping:
    """Remembers per attempt the newest step and when it was first seen; a new scheduler begins anew."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, datetime]] = {}

    def since(self, attempt: Attempt, now: datetime) -> datetime:
        """When the attempt's last step was first seen: ``now`` if it is new."""
        name = attempt_id(attempt.job_id, attempt.number)
        step, seen_at = self._seen.get(name, (-1, now))
        if attempt.last_step == step:
            return seen_at
        self._seen[name] = (attempt.last_step, now)
        return now

    def forget_all_but(self, names: Collection[str]) -> None:
        """Drop what is known of other attempts."""
        self._seen = {name: seen for name, seen in self._seen.items() if name in names}
