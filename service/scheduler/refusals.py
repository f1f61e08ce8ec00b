"""Launches that the cluster refused though it answers: asked again less and less often, and never given up."""

from collections.abc import Collection

_FIRST_S = 1.0
_LAST_S = 60.0


class Refusals:
    """Per job, how often in a row its launch was refused and until when it is not asked for again.

    Times are seconds of a clock that is never set, such as `time.monotonic`'s. A new scheduler begins anew.
    """

    def __init__(self) -> None:
        self._refused: dict[str, tuple[int, float]] = {}

    def note(self, job_id: str, now_s: float) -> float:
        """Take note of one more; the seconds that it now waits, twice those of the last time and at most 60."""
        count = self._refused.get(job_id, (0, 0.0))[0]
        waits_s = min(_FIRST_S * 2.0**count, _LAST_S)
        self._refused[job_id] = (count + 1, now_s + waits_s)
        return waits_s

    def hold_back(self, job_id: str, now_s: float) -> bool:
        """Whether it is too early to ask again."""
        return job_id in self._refused and now_s < self._refused[job_id][1]

    def forget(self, job_id: str) -> None:
        """The cluster has taken it."""
        self._refused.pop(job_id, None)

    def forget_all_but(self, job_ids: Collection[str]) -> None:
        """Drop what is known of other jobs."""
        self._refused = {name: refused for name, refused in self._refused.items() if name in job_ids}
