"""When another momentum is called better."""

import math

import pytest

from service.jobs import MomentumReplay, ReplayedMomentum
from service.reports.momentum import judge_momentum


def _replay(used: tuple[float, float], best: tuple[float, float]) -> MomentumReplay:
    """Momentum 0.1 in use and 0.03 as the best, each with its shift and output error."""
    candidates = [
        ReplayedMomentum(momentum=momentum, rms_mean_shift=shift, output_error=error)
        for momentum, (shift, error) in ((0.1, used), (0.03, best))
    ]
    return MomentumReplay(step=500, num_steps=400, used=0.1, best=0.03, candidates=tuple(candidates))


@pytest.mark.parametrize(
    ("used", "best", "better"),
    [
        ((0.11, 0.12), (0.02, 0.03), 0.03),
        ((0.11, 0.12), (0.06, 0.06), 0.03),
        ((0.11, 0.12), (0.06, 0.07), None),  # does not halve the error
        ((0.04, 0.12), (0.01, 0.01), None),  # too little to matter
        ((0.11, math.nan), (0.02, 0.03), 0.03),
        ((0.11, math.inf), (math.nan, math.nan), None),
        ((math.nan, math.nan), (0.02, 0.03), None),
    ],
)
def test_a_momentum_is_better_if_it_halves_an_error_that_matters(
    used: tuple[float, float], best: tuple[float, float], better: float | None
) -> None:
    verdict = judge_momentum(_replay(used, best))
    assert verdict is not None
    assert verdict.better == better
    assert ("would have given a shift of 0.0" in verdict.sentence) == (better is not None)


def test_without_a_replay_or_without_the_momentum_in_use_nothing_is_said_to_be_better() -> None:
    assert judge_momentum(None) is None
    verdict = judge_momentum(_replay((0.1, 0.1), (0.0, 0.0)).model_copy(update={"used": 0.5}))
    assert verdict is not None
    assert verdict.better is None
    broken = judge_momentum(_replay((math.nan, math.nan), (math.nan, math.nan)))
    assert broken is not None
    assert broken.better is None
    assert "Undecided" in broken.sentence
