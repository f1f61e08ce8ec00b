"""What a moving average remembers, against averages that really ran."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize

from syncbn.drift import (
    best_momentum,
    effective_batches,
    half_life,
    initial_weight,
    lag_bias,
    lag_steps,
    noise,
    smallest_momentum,
)

F64 = torch.float64


def _averaged(values: torch.Tensor, momentum: float) -> torch.Tensor:
    """The running mean after the last of ``(T, C)``."""
    average = torch.zeros(values.size(1), dtype=F64)
    for value in values:
        average.lerp_(value, momentum)
    return average


@pytest.mark.parametrize("momentum", [0.5, 0.1, 0.03])
def test_the_noise_of_an_average_is_the_one_seen(momentum: float) -> None:
    generator, num_images = torch.Generator().manual_seed(1), 4
    means = torch.randn(300, 3000, generator=generator, dtype=F64) * 3 / math.sqrt(num_images)
    seen = _averaged(means, momentum).std()
    assert (seen / noise(momentum, torch.tensor(9.0), num_images)).item() == pytest.approx(1, abs=0.04)
    assert effective_batches(momentum) == pytest.approx(9 / num_images / seen.item() ** 2, rel=0.08)


def test_the_lag_is_how_far_an_average_trails_a_line() -> None:
    for momentum in (0.5, 0.1):
        line = torch.arange(400, dtype=F64).unsqueeze(1) * 0.2
        behind = line[-1] - _averaged(line, momentum)
        torch.testing.assert_close(behind, lag_bias(momentum, torch.tensor([0.2])), rtol=1e-6, atol=0)


def test_the_age_of_an_average_is_arithmetic() -> None:
    assert initial_weight(0.1, 44) < 0.01 < initial_weight(0.1, 43)
    assert smallest_momentum(500) == pytest.approx(1 - 0.01 ** (1 / 500), rel=1e-12)
    assert initial_weight(smallest_momentum(77, 0.2), 77) == pytest.approx(0.2, rel=1e-12)
    assert (1 - 0.01) ** half_life(0.01) == pytest.approx(0.5, rel=1e-12)
    assert (lag_steps(0.01), effective_batches(0.01)) == (99, 199)


def test_a_cumulative_average_weighs_all_batches_alike() -> None:
    assert (initial_weight(None, 0), initial_weight(None, 1)) == (1, 0)
    assert (lag_steps(None, 11), effective_batches(None, 11)) == (5, 11)


def test_the_ends_of_the_scale_are_told_as_they_are() -> None:
    assert (initial_weight(1.0, 1), lag_steps(1.0), half_life(1.0), effective_batches(1.0)) == (0, 0, 0, 1)
    assert (initial_weight(0.0, 9), lag_steps(0.0), half_life(0.0)) == (1, math.inf, math.inf)
    with pytest.raises(ValueError, match="momentum from 0 to 1"):
        lag_steps(1.5)


def test_the_best_momentum_has_the_least_error_of_all() -> None:
    for between_var, num_images, slope in ((1.0, 8, 0.01), (0.2, 64, 1e-4), (1.0, 2, 3.0)):

        def error(momentum: float, s: float = slope, v: float = between_var / num_images) -> float:
            return v * momentum / (2 - momentum) + (s * (1 - momentum) / momentum) ** 2

        found = optimize.minimize_scalar(error, bounds=(1e-5, 1), method="bounded", options={"xatol": 1e-9})
        best = best_momentum(torch.tensor(between_var), num_images, torch.tensor(slope))
        assert best.item() == pytest.approx(found.x, rel=1e-3)
    still = best_momentum(torch.tensor([1.0, 0.0]), 8, torch.tensor([0.0, 1.0]))
    np.testing.assert_array_equal(still, [0, 1])
