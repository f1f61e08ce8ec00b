"""Findings: where one rank's batches differ most from the others', as numbers and as a sentence."""

from dataclasses import dataclass
from enum import StrEnum


class RankQuantity(StrEnum):
    """In what a rank's batches can differ from those of the others."""

    MEAN = "mean"
    VARIANCE = "variance"


@dataclass(frozen=True)
class RankFinding:
    """Where one rank's batches differ most from those of the others in the same steps.

    The others are those ranks that are not found to differ themselves, or differ less; with two left, each is compared
    with the other, and nothing tells which of them is as it should be.

    ``z``: in standard errors over ``num_samples`` sampled steps.
    ``threshold``: what ``|z|`` passes by chance in less than one of a hundred runs, however many samples are looked
        at, over all ranks, layers and channels together.
    ``size``: in standard deviations of the values for the mean, of log variance in nats (to first order) for the
        variance; signed as ``z``.
    ``min_size``: what ``|size|`` has to reach to matter.
    """

    rank: int
    layer: str
    channel: int
    quantity: RankQuantity
    z: float
    threshold: float
    size: float
    num_samples: int
    min_size: float

    @property
    def is_significant(self) -> bool:
        """Whether this is more than chance. With enough samples any two shards of a data set differ by something."""
        return abs(self.z) > self.threshold

    @property
    def fires(self) -> bool:
        """Whether it is more than chance and large enough to matter."""
        return self.is_significant and abs(self.size) >= self.min_size

    def __str__(self) -> str:
        what = f"channel {self.channel} of {self.layer or 'the only layer'}"
        how = f"z {self.z:+.1f}, threshold {self.threshold:.1f}, {self.num_samples} samples"
        if not self.is_significant:
            return f"rank {self.rank} sees what the others see; it differs most in {what} ({how})"
        return (
            f"rank {self.rank} sees {'' if self.fires else 'slightly '}other data: {self._difference} in {what} ({how})"
        )

    @property
    def _difference(self) -> str:
        if self.quantity is RankQuantity.MEAN:
            return f"{abs(self.size):.2f} standard deviations {'higher' if self.size > 0 else 'lower'}"
        return f"variance {'above' if self.size > 0 else 'below'} the others' by {abs(self.size):.2f} nats"
