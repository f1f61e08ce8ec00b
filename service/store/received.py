"""Which sequence numbers of one rank have arrived: a set of whole numbers, kept as ranges."""

import json
from dataclasses import dataclass

Range = tuple[int, int]
"""From the first number to one past the last."""


@dataclass(frozen=True)
class Received:
    """Sorted ranges that neither touch nor overlap; mostly one, more while something is missing."""

    ranges: tuple[Range, ...] = ()

    @property
    def next_seq(self) -> int:
        """The lowest number that has not arrived: where a sender goes on, or goes back to."""
        return self.ranges[0][1] if self.ranges and self.ranges[0][0] == 0 else 0

    def missing(self, first: int, end: int) -> list[Range]:
        """The parts of ``first .. end`` that have not arrived, in order."""
        holes: list[Range] = []
        for start, stop in self.ranges:
            if first < min(start, end):
                holes.append((first, min(start, end)))
            first = max(first, stop)
        if first < end:
            holes.append((first, end))
        return holes

    def plus(self, first: int, end: int) -> "Received":
        """With ``first .. end`` arrived too."""
        merged: list[Range] = []
        for start, stop in sorted((*self.ranges, (first, end)) if first < end else self.ranges):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
            else:
                merged.append((start, stop))
        return Received(tuple(merged))

    def dump(self) -> str:
        """As JSON."""
        return json.dumps(self.ranges, separators=(",", ":"))

    @classmethod
    def load(cls, text: str) -> "Received":
        """Inverse of `dump`."""
        return cls(tuple((start, stop) for start, stop in json.loads(text)))
