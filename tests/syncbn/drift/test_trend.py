"""Slopes with intervals that hold the true slope as often as they say, also where noise remembers."""

import pytest
import torch
from torch import Tensor

from syncbn.drift.trend import fit_trend

F64 = torch.float64
STEPS = torch.arange(0, 4000, 8)  # 500 samples


def _noise(rho: float, num_channels: int, generator: torch.Generator) -> Tensor:
    fresh = torch.randn(len(STEPS), num_channels, generator=generator, dtype=F64)
    values = fresh.clone()
    for step in range(1, len(STEPS)):
        values[step] = rho * values[step - 1] + fresh[step]
    return values


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_the_interval_holds_the_true_slope_about_as_often_as_it_says(rho: float) -> None:
    generator, std, slope = torch.Generator().manual_seed(1), torch.full((16,), 2.0, dtype=F64), 0.05
    held = []
    for _ in range(8):
        values = _noise(rho, 16, generator) + slope * std * STEPS.unsqueeze(1) / 100
        found = fit_trend(values, STEPS, std)
        if found is not None:
            held.append(((found.low <= slope) & (slope <= found.high)).double().mean())
    assert len(held) > 4
    assert 0.88 < torch.stack(held).mean() <= 1.0  # of 128 intervals; 0.95 is meant


def test_a_line_without_noise_is_its_slope_and_still_values_have_none() -> None:
    line = STEPS.unsqueeze(1) * torch.tensor([0.01, -0.02], dtype=F64)
    found = fit_trend(line, STEPS, torch.ones(2))
    assert found is not None
    torch.testing.assert_close(found.slope, torch.tensor([1.0, -2.0], dtype=F64))
    assert found.rms == pytest.approx((5 / 2) ** 0.5)
    still = fit_trend(torch.ones(len(STEPS), 2), STEPS, torch.ones(2))
    assert still is not None
    assert still.rms == 0


def test_noise_that_remembers_for_too_long_is_undecided() -> None:
    walk = torch.randn(500, 16, generator=torch.Generator().manual_seed(2), dtype=F64).cumsum(0)
    assert fit_trend(walk, STEPS, torch.ones(16)) is None
    assert fit_trend(walk[:4], STEPS[:4], torch.ones(16)) is None
    with pytest.raises(ValueError, match="as many values as steps"):
        fit_trend(walk, STEPS[1:], torch.ones(16))
