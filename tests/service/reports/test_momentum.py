"""When another momentum is called better."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.jobs import MomentumReplay, ReplayedMomentum
from service.reports.margins import STALE_SHIFT
from service.reports.momentum import WORTHWHILE, judge_momentum


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
    assert ("would have left the outputs of the worst layer off by 0.0" in verdict.sentence) == (better is not None)


def test_without_a_replay_or_without_the_momentum_in_use_nothing_is_said_to_be_better() -> None:
    assert judge_momentum(None) is None
    verdict = judge_momentum(_replay((0.1, 0.1), (0.0, 0.0)).model_copy(update={"used": 0.5}))
    assert verdict is not None
    assert verdict.better is None
    broken = judge_momentum(_replay((math.nan, math.nan), (math.nan, math.nan)))
    assert broken is not None
    assert broken.better is None
    assert "Undecided" in broken.sentence


def test_the_sentence_speaks_of_the_error_that_was_judged() -> None:
    judged = [judge_momentum(_replay(*pair)) for pair in [((0.08, 0.1), (0.02, 0.07)), ((0.04, 0.12), (0.01, 0.01))]]
    assert [verdict.sentence for verdict in judged if verdict] == [
        "bn_momentum 0.1 does about as well as any: the outputs of the worst layer are off by 0.1 sd (root mean "
        "square), and by 0.07 with 0.03 (replayed over the last 400 steps).",
        "bn_momentum 0.1 does well enough: running means are off by 0.04 sd in the worst layer, and less than 0.05 "
        "does not matter, although outputs are off by 0.12 sd (root mean square), and by 0.01 with 0.03 (replayed "
        "over the last 400 steps).",
    ]


_NUMBERS = st.floats(0, 1) | st.sampled_from([0.0, math.nan, math.inf])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(_NUMBERS, _NUMBERS), min_size=1, max_size=4), st.integers(0, 3))
def test_no_sentence_contradicts_its_verdict(numbers: list[tuple[float, float]], place: int) -> None:
    candidates = tuple(
        ReplayedMomentum(momentum=0.5 / 3**n, rms_mean_shift=shift, output_error=error)
        for n, (shift, error) in enumerate(numbers)
    )
    used, best = candidates[place % len(candidates)], min(candidates, key=lambda one: one.output_error)
    verdict = judge_momentum(
        MomentumReplay(step=9, num_steps=8, used=used.momentum, best=best.momentum, candidates=candidates)
    )
    assert verdict is not None
    said = verdict.sentence
    if "Undecided" in said:
        assert verdict.better is None
        return
    off = [float(number) for number in re.findall(r"([\d.e-]+|inf|nan) (?:sd \(|with)", said)]
    if "would have left" in said:
        assert verdict.better == best.momentum
        of_best, of_used = off[0], float(re.findall(r"instead of (\S+)", said)[0])
        assert not math.isfinite(of_used) or of_best <= WORTHWHILE * of_used
        return
    assert verdict.better is None
    if "as well as any" in said:
        of_used, of_best = off
        assert of_best > WORTHWHILE * of_used
    elif "well enough" in said:
        assert "does not matter" in said
        assert float(re.findall(r"means are off by (\S+)", said)[0]) < STALE_SHIFT
    else:
        assert "is the best of those replayed" in said
        assert used == best
