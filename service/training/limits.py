"""Limits on drift: which layers have come to exceed one, told once and not at every sample."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from service.jobs import Drift, DriftLimit, LimitAction, LimitExceeded


class LimitWatch:
    """Holds the drift samples of one run against ``limits``."""

    def __init__(self, limits: Sequence[DriftLimit]) -> None:
        self._limits = limits
        self._beyond: set[tuple[int, str]] = set()

    @property
    def may_recompute(self) -> bool:
        """Whether a limit asks for new statistics when it is exceeded."""
        return any(limit.action is LimitAction.RECOMPUTE for limit in self._limits)

    def exceeded(self, drift: Drift) -> Iterator[LimitExceeded]:
        """The limits and layers that this sample is the first to find beyond, since one that found them within.

        A limit that asks for new statistics tells every time: they are new at each. NaN is beyond any limit.
        """
        for number, limit in enumerate(self._limits):
            for layer in drift.layers:
                value: float = getattr(layer, limit.metric.value)
                if not fnmatchcase(layer.layer, limit.layers):
                    continue
                was_beyond = (number, layer.layer) in self._beyond
                if value <= limit.above:
                    self._beyond.discard((number, layer.layer))
                    continue
                self._beyond.add((number, layer.layer))
                if not was_beyond or limit.action is LimitAction.RECOMPUTE:
                    yield LimitExceeded(
                        step=drift.step,
                        limit=number,
                        layer=layer.layer,
                        metric=limit.metric,
                        value=value,
                        above=limit.above,
                        action=limit.action,
                    )
