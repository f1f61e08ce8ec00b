import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from syncbn.bootstrap import mean_interval


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _exponential(size: int, seed: int) -> Tensor:
    return torch.empty(size, dtype=torch.float64).exponential_(generator=_generator(seed))


def test_it_agrees_with_scipys_accelerated_bootstrap() -> None:
    values = _exponential(200, seed=1) ** 2
    low, high = mean_interval(values, num_resamples=20_000, generator=_generator())
    expected = scipy.stats.bootstrap(
        (values.numpy(),), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(0), vectorized=True
    ).confidence_interval
    # Both ends carry the noise of their draws, and scipy counts its bias from them: a few percent of the length.
    assert [low, high] == pytest.approx([expected.low, expected.high], abs=0.03 * (expected.high - expected.low))
    mean = values.mean().item()
    assert high - mean > 1.1 * (mean - low)  # values with a long upper tail leave more room above


@pytest.mark.parametrize("size", [50, 300])
@pytest.mark.parametrize(
    ("draw", "mean", "lowest"),
    [
        (lambda size, seed: torch.randn(size, generator=_generator(seed), dtype=torch.float64), 0.0, 0.92),
        (_exponential, 1.0, 0.91),
    ],
    ids=["normal", "exponential"],
)
def test_it_covers_the_mean_about_as_often_as_it_says(
    draw: Callable[[int, int], Tensor], mean: float, lowest: float, size: int
) -> None:
    covered = 0
    for seed in range(300):
        low, high = mean_interval(draw(size, seed), num_resamples=500, generator=_generator(seed + 1000))
        covered += low <= mean <= high
    # Measured over 1000 samples: 94 % and 93 % at 50, 95 % at 300. Three standard errors of 300 trials are 4 %.
    assert lowest - 0.03 <= covered / 300 <= 0.985


def test_it_narrows_with_the_level_and_moves_with_the_values() -> None:
    values = _exponential(100, seed=2)
    low, high = mean_interval(values, generator=_generator())
    inner_low, inner_high = mean_interval(values, level=0.5, generator=_generator())
    assert low < inner_low < values.mean() < inner_high < high
    moved = mean_interval(3 * values + 1e6, generator=_generator())
    assert moved == pytest.approx((3 * low + 1e6, 3 * high + 1e6), abs=1e-8)  # 1e6 leaves doubles ten digits


def test_the_same_seed_gives_the_same_bits_and_another_nearly() -> None:
    values = _exponential(700, seed=3)  # in several pieces
    one, again, other = (mean_interval(values, generator=_generator(seed)) for seed in (5, 5, 6))
    assert one == again != other
    assert one == pytest.approx(other, abs=0.15 * (one[1] - one[0]))


def test_equal_values_leave_no_room() -> None:
    assert mean_interval(torch.full((7,), 0.1, dtype=torch.float64), generator=_generator()) == (0.1, 0.1)
    assert mean_interval(torch.zeros(1), generator=_generator()) == (0.0, 0.0)


@pytest.mark.parametrize(("lost", "won", "seed"), [(7, 2, 2), (8, 2, 3), (9, 3, 0)])
def test_an_end_at_zero_is_zero_and_not_what_rounding_leaves(lost: int, won: int, seed: int) -> None:
    """Means of resampled answers that were lost and won of 360 can be 0; rounding put 2e-18 there, above 0."""
    values = torch.cat([torch.ones(lost), -torch.ones(won), torch.zeros(360 - lost - won)]).double()
    low, _ = mean_interval(values, generator=_generator(seed))
    assert low == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_has_no_interval(value: float) -> None:
    low, high = mean_interval(torch.tensor([0.0, value, 1.0]), generator=_generator())
    assert math.isnan(low)
    assert math.isnan(high)


def test_what_makes_no_sense_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"shape \(0,\)"):
        mean_interval(torch.empty(0), generator=_generator())
    with pytest.raises(ValueError, match="level 95 is not between"):
        mean_interval(torch.ones(3), level=95, generator=_generator())
    with pytest.raises(ValueError, match="num_resamples 1 is below 2"):
        mean_interval(torch.ones(3), num_resamples=1, generator=_generator())
