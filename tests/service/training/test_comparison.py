import math

import pytest
import torch
from torch import Tensor

from service.training.comparison import BestEvaluation, compare


def _losses(level: float, seed: int, size: int = 300) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return level + 0.1 * torch.randn(size, generator=generator, dtype=torch.float64)


def test_a_rise_is_paired_with_the_best_evaluation_and_not_with_the_last() -> None:
    best, first = BestEvaluation(), _losses(1.0, seed=0)
    assert best.since(first, 10) is None
    worse = best.since(first + 0.2, 20)
    better = best.since(first - 0.3, 30)
    again = best.since(first - 0.29 + 0.05 * _losses(0.0, seed=1), 40)
    assert worse is not None
    assert better is not None
    assert again is not None
    # Every image lost the same: pairing leaves no doubt, although single losses differ by 0.1.
    assert (worse.best_step, worse.best_loss) == (10, first.mean().item())
    assert (worse.rise, worse.interval.low, worse.interval.high) == pytest.approx((0.2,) * 3, abs=1e-12)
    assert (better.best_step, again.best_step) == (10, 30)
    assert (better.rise, again.best_loss) == pytest.approx((-0.3, first.mean().item() - 0.3))
    assert 0 < again.interval.low < 0.01 < again.interval.high


def test_losses_that_are_no_numbers_are_never_the_best() -> None:
    best, first = BestEvaluation(), _losses(1.0, seed=0)
    assert best.since(torch.full_like(first, math.nan), 10) is None
    assert best.since(first, 20) is None
    diverged = best.since(torch.full_like(first, math.inf), 30)
    assert diverged is not None
    assert diverged.best_step == 20
    assert math.isnan(diverged.interval.low)
    after = best.since(first, 40)
    assert after is not None
    assert (after.best_step, after.rise) == (20, 0.0)


def test_a_single_image_has_no_standard_error() -> None:
    one = torch.tensor([[0.5], [1.0]], dtype=torch.float64)
    evaluation = compare(one, one, one, BestEvaluation(), step=1, epoch=1)
    assert math.isnan(evaluation.loss_damage_se)
    assert (evaluation.stored.loss, evaluation.stored.accuracy, evaluation.loss_damage) == (0.5, 1.0, 0.0)
