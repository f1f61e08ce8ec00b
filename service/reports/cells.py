"""Means of equally many consecutive values of a series of any length, in constant memory."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.reports.blocks import Series

Steps = NDArray[np.int64]

SMALLEST_CELL = 5
MOST_CELLS = 400


@dataclass(frozen=True, slots=True)
class _Cell:
    """The mean of ``SMALLEST_CELL * 2**level`` values, of which the first and the last were at these steps."""

    first_step: int
    last_step: int
    mean: float
    level: int


class CellMeans:
    """A growing series, kept as the means of its cells: 5 values each, and twice as many whenever 400 are held.

    So a cell never holds more than one 200th of the series, but for the first 1,000 values. A cell is always merged
    from the same two, whatever the pieces in which the values came: the means do not depend on those, to the last bit.
    Cost: O(1) memory; O(1) a value.
    """

    def __init__(self) -> None:
        self._cells: list[_Cell] = []
        """Cells of the present level, then at most one of each smaller level, falling."""
        self._level = 0
        self._steps: Steps = np.empty(0, np.int64)
        self._values: Series = np.empty(0)
        """Fewer values than make a cell, with their steps."""

    @property
    def width(self) -> int:
        """How many values a cell holds."""
        return SMALLEST_CELL << self._level

    @property
    def num_values(self) -> int:
        """How many values are kept, in cells or not yet."""
        return sum(SMALLEST_CELL << cell.level for cell in self._cells) + len(self._values)

    @property
    def last_step(self) -> int | None:
        """The step of the last value."""
        if len(self._steps):
            return int(self._steps[-1])
        return self._cells[-1].last_step if self._cells else None

    @property
    def means(self) -> Series:
        """Means of the whole cells, oldest first; fewer than ``width`` values came after them."""
        return np.array([cell.mean for cell in self._cells if cell.level == self._level])

    @property
    def first_steps(self) -> Steps:
        """The step of the first value in each of the cells of ``means``."""
        return np.array([cell.first_step for cell in self._cells if cell.level == self._level], np.int64)

    def mean_of_last(self) -> float | None:
        """The mean of about the last 20 values, or of all if there are fewer."""
        kept = list(self._values)
        for cell in reversed(self._cells):
            if len(kept) >= 4 * SMALLEST_CELL:
                break
            kept = [cell.mean] * SMALLEST_CELL + kept
        return float(_mean(np.array([kept]), len(kept))[0]) if kept else None

    def extend(self, steps: Steps, values: Series) -> None:
        """Append values whose steps rise, from above ``last_step`` on. Values may be infinite or no number."""
        steps, values = np.concatenate([self._steps, steps]), np.concatenate([self._values, values])
        whole = len(values) // SMALLEST_CELL * SMALLEST_CELL
        rows = steps[:whole].reshape(-1, SMALLEST_CELL)
        means = _mean(values[:whole].reshape(-1, SMALLEST_CELL), SMALLEST_CELL)
        for first, last, mean in zip(rows[:, 0].tolist(), rows[:, -1].tolist(), means.tolist(), strict=True):
            self._push(_Cell(first, last, mean, 0))
        self._steps, self._values = steps[whole:].copy(), values[whole:].copy()

    def forget_from(self, step: int) -> None:
        """Forget all values from ``step`` on.

        A cell that reaches beyond ``step`` goes as a whole, so fewer than ``width`` values before ``step`` go too.
        """
        kept = self._steps < step
        self._steps, self._values = self._steps[kept], self._values[kept]
        while self._cells and self._cells[-1].last_step >= step:
            self._cells.pop()
        if not self._cells:
            self._level = 0

    def _push(self, cell: _Cell) -> None:
        self._cells.append(cell)
        while len(self._cells) > 1 and self._cells[-2].level == self._cells[-1].level < self._level:
            self._cells[-2:] = [_merged(*self._cells[-2:])]
        if len(self._cells) == MOST_CELLS and self._cells[-1].level == self._level:
            self._cells = [_merged(a, b) for a, b in zip(self._cells[::2], self._cells[1::2], strict=True)]
            self._level += 1


def _merged(a: _Cell, b: _Cell) -> _Cell:
    return _Cell(a.first_step, b.last_step, a.mean / 2 + b.mean / 2, a.level + 1)


def _mean(rows: Series, num: int) -> Series:
    """Means of rows, added from left to right: the same bits however many rows there are, and no overflow."""
    with np.errstate(invalid="ignore"):  # infinity minus infinity is no number, which is what shall be kept
        total: Series = np.zeros(len(rows))
        for column in range(rows.shape[1]):
            total = total + rows[:, column] / num
    return total
