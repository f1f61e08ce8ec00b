"""Cell means against numpy's means of the whole series."""

import math

import numpy as np
import pytest

from service.reports.cells import MOST_CELLS, CellMeans


def _cells(n: int, seed: int = 0) -> tuple[CellMeans, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    values = np.random.default_rng(seed).standard_normal(n)
    cells = CellMeans()
    cells.extend(np.arange(1, n + 1), values)
    return cells, values


@pytest.mark.parametrize(("n", "width"), [(4, 5), (5, 5), (1999, 5), (2000, 10), (2009, 10), (50_123, 160)])
def test_cells_hold_the_means_of_consecutive_values(n: int, width: int) -> None:
    cells, values = _cells(n)
    num = n // width
    assert (cells.width, cells.num_values, cells.last_step) == (width, n, n)
    np.testing.assert_allclose(cells.means, values[: num * width].reshape(num, width).mean(axis=1), atol=1e-15)
    assert cells.first_steps.tolist() == list(range(1, num * width + 1, width))


def test_memory_stays_constant_and_cells_are_never_more_than_a_200th_of_a_long_series() -> None:
    cells = CellMeans()
    for begin in range(0, 300_000, 30_000):
        cells.extend(np.arange(begin, begin + 30_000), np.ones(30_000))
        assert len(cells.means) < MOST_CELLS
        assert cells.width <= cells.num_values / 200


def test_any_pieces_give_the_same_bits() -> None:
    whole, values = _cells(4321)
    pieces = CellMeans()
    cuts = np.sort(np.random.default_rng(1).integers(0, 4321, 200))
    for steps, some in zip(np.split(np.arange(1, 4322), cuts), np.split(values, cuts), strict=True):
        pieces.extend(steps, some)
    assert pieces.means.tolist() == whole.means.tolist()
    assert pieces.mean_of_last() == whole.mean_of_last()


def test_forgetting_goes_back_to_the_cell_before_the_step() -> None:
    cells, values = _cells(3000)
    cells.forget_from(1234)
    assert cells.num_values == 1230  # cells of 10, the one of 1231 to 1240 is gone
    cells.extend(np.arange(1231, 3001), values[1230:])
    assert cells.means.tolist() == _cells(3000)[0].means.tolist()
    cells.forget_from(1)
    assert (cells.num_values, cells.last_step, cells.width, cells.mean_of_last()) == (0, None, 5, None)


def test_forgetting_among_the_last_values_loses_none_before() -> None:
    cells, values = _cells(2004)
    cells.forget_from(2003)
    assert cells.num_values == 2002
    assert cells.mean_of_last() == pytest.approx(values[1982:2002].mean(), abs=0.2)


def test_the_largest_numbers_do_not_overflow_and_no_number_stays_none() -> None:
    largest = float(np.finfo(np.float64).max)
    cells = CellMeans()
    cells.extend(np.arange(15), np.array([largest] * 5 + [math.inf, -math.inf, 0, 0, 0] + [math.inf] * 5))
    assert cells.means[0] == pytest.approx(largest, rel=1e-12)
    assert math.isnan(cells.means[1])
    assert cells.means[2] == math.inf
