"""Convergence verdicts: planted courses, measured error rates, and series of every ugliness."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.signal import lfilter

from service.jobs import ConvergenceVerdict
from service.reports import LossCourse, judge_convergence


def _noise(seed: int, n: int, correlation: float) -> NDArray[np.float64]:
    """Stationary AR(1) noise of standard deviation 1."""
    rng = np.random.default_rng(seed)
    innovations = rng.standard_normal(n) * math.sqrt(1 - correlation**2)
    noise, _ = lfilter([1], [1, -correlation], innovations, zi=[correlation * rng.standard_normal()])
    return np.asarray(noise, dtype=np.float64)


def _share(losses: list[NDArray[np.float64]]) -> dict[ConvergenceVerdict, float]:
    verdicts = Counter(judge_convergence(range(len(x)), x.tolist(), 10).verdict for x in losses)
    return {verdict: verdicts[verdict] / len(losses) for verdict in ConvergenceVerdict}


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("n", [200, 1000])
def test_flat_noise_is_rarely_called_a_trend(n: int, correlation: float) -> None:
    """1,000 series gave at most 3.9 % each way; 400 series of such a rate pass 7 % about once in 400 tries."""
    share = _share([1 + 0.2 * _noise(seed, n, correlation) for seed in range(400)])
    assert share[ConvergenceVerdict.IMPROVING] < 0.07
    assert share[ConvergenceVerdict.WORSENING] < 0.07
    assert share[ConvergenceVerdict.DIVERGED] == 0


@pytest.mark.parametrize(
    ("change", "verdict"), [(-0.3, ConvergenceVerdict.IMPROVING), (0.3, ConvergenceVerdict.WORSENING)]
)
@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_a_planted_slope_is_found(change: float, verdict: ConvergenceVerdict, correlation: float) -> None:
    share = _share([1 + 0.1 * _noise(s, 1000, correlation) + change * np.arange(1000) / 200 for s in range(100)])
    assert share[verdict] > 0.95


def test_a_slope_below_what_matters_is_never_called_a_trend() -> None:
    losses = [1 + 0.005 * _noise(s, 1000, 0) + 0.004 * np.arange(1000) / 200 for s in range(100)]
    share = _share(losses)
    assert share[ConvergenceVerdict.IMPROVING] == share[ConvergenceVerdict.WORSENING] == 0
    assert share[ConvergenceVerdict.PLATEAU] > 0.8


@pytest.mark.parametrize(("n", "steps_per_e"), [(450, 100), (1000, 300), (3000, 600)])
def test_an_exponential_fall_is_improving(n: int, steps_per_e: int) -> None:
    fall = 0.05 + 2.2 * np.exp(-np.arange(n) / steps_per_e)
    share = _share([fall * (1 + 0.3 * _noise(s, n, 0)) for s in range(50)])
    assert share[ConvergenceVerdict.IMPROVING] > 0.9


def test_the_numbers_of_a_noiseless_line_are_exact() -> None:
    """From 2.0 by -0.001 a step: over 200 steps -0.2, the last block of 20 at 1.8105; to 1e-9."""
    verdict = judge_convergence(range(1, 201), [2 - 0.001 * step for step in range(1, 201)], 10)
    assert verdict.verdict is ConvergenceVerdict.IMPROVING
    assert verdict.slope == pytest.approx(-0.2, abs=1e-9)
    assert (verdict.slope_low, verdict.slope_high) == pytest.approx((-0.2, -0.2), abs=1e-9)
    assert verdict.current_loss == pytest.approx(1.8095, abs=1e-9)
    assert verdict.margin == pytest.approx(0.018095, abs=1e-9)
    assert (verdict.block_steps, verdict.num_blocks, verdict.num_steps) == (20, 10, 200)


def test_a_constant_loss_is_a_plateau() -> None:
    assert judge_convergence(range(400), [0.1] * 400, 10).verdict is ConvergenceVerdict.PLATEAU


def test_next_to_no_loss_is_a_plateau_whatever_its_noise() -> None:
    losses = 1e-4 * (1 + 0.5 * _noise(0, 1000, 0))
    assert judge_convergence(range(1000), losses.tolist(), 10).verdict is ConvergenceVerdict.PLATEAU


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_step_that_is_not_finite_is_named(bad: float) -> None:
    losses = [1.0] * 300
    losses[41] = bad
    losses[99] = math.nan
    verdict = judge_convergence(range(1, 301), losses, 10)
    assert verdict.verdict is ConvergenceVerdict.DIVERGED
    assert verdict.first_non_finite_step == 42
    assert "step 42" in verdict.sentence


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([1.0] * 40 + [3.1] * 40, True),
        ([1.0] * 60 + [3.1] * 20, False),  # one block is a spike
        ([1.0] * 40 + [9.0] * 40 + [1.0] * 40, False),  # it came back
        ([0.001] * 40 + [0.2] * 40, False),  # 200 times nothing
        ([5.0] * 60, True),  # over twice the loss of guessing, 4.605
        ([4.5] * 60, False),
        ([-1.0] * 40 + [-0.9] * 40, False),
    ],
)
def test_divergence_is_a_lasting_rise(losses: list[float], diverged: bool) -> None:
    verdict = judge_convergence(range(len(losses)), losses, 10).verdict
    assert (verdict is ConvergenceVerdict.DIVERGED) is diverged


def test_a_high_loss_during_warmup_is_no_divergence() -> None:
    losses = [5.0] * 60
    assert judge_convergence(range(60), losses, 10, warmup_steps=30).verdict is ConvergenceVerdict.UNDECIDED
    assert judge_convergence(range(60), losses, None).verdict is ConvergenceVerdict.UNDECIDED


@pytest.mark.parametrize("n", [0, 1, 19, 199])
def test_too_few_steps_say_how_many_are_needed(n: int) -> None:
    verdict = judge_convergence(range(n), [1.0] * n, 10)
    assert verdict.verdict is ConvergenceVerdict.UNDECIDED
    assert "200 are needed" in verdict.sentence


def test_long_memory_asks_for_more_steps_instead_of_guessing() -> None:
    verdict = judge_convergence(range(200), (1 + 0.2 * _noise(0, 200, 0.97)).tolist(), 10)
    assert verdict.verdict is ConvergenceVerdict.UNDECIDED
    assert verdict.block_correlation is not None
    assert verdict.block_correlation > 0.3
    assert "400 are needed" in verdict.sentence


def test_a_repeated_step_counts_by_its_last_loss() -> None:
    once = judge_convergence(range(200), [1.0] * 200, 10)
    steps = [*range(150), *range(100, 200)]
    assert judge_convergence(steps, [1.0] * 100 + [math.nan] * 50 + [1.0] * 100, 10) == once


def test_the_order_of_the_points_does_not_matter() -> None:
    losses = (1 + 0.1 * _noise(5, 300, 0)).tolist()
    backwards = judge_convergence(range(299, -1, -1), losses[::-1], 10)
    assert backwards == judge_convergence(range(300), losses, 10)


def test_steps_without_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        judge_convergence([1, 2], [0.5], 10)


_LOSS = st.one_of(st.floats(), st.floats(0, 10))


@given(
    st.lists(_LOSS, max_size=60), st.integers(1, 30), st.one_of(st.none(), st.integers(0, 1000)), st.integers(0, 500)
)
def test_any_series_gets_a_verdict(pattern: list[float], times: int, num_classes: int | None, warmup: int) -> None:
    losses = pattern * times
    verdict = judge_convergence(range(len(losses)), losses, num_classes, warmup_steps=warmup)
    assert verdict.verdict in ConvergenceVerdict
    assert verdict.sentence
    if not all(map(math.isfinite, losses)):
        assert verdict.verdict is ConvergenceVerdict.DIVERGED


@given(
    st.lists(_LOSS, min_size=1, max_size=40),
    st.integers(1, 60),
    st.lists(st.integers(0, 2400), max_size=8),
    st.booleans(),
)
def test_losses_in_any_pieces_give_the_verdict_of_the_whole(
    pattern: list[float], times: int, cuts: list[int], one_by_one: bool
) -> None:
    losses = pattern * times
    course = LossCourse(10, warmup_steps=7, total_steps=2000)
    edges = [0, *sorted(min(cut, len(losses)) for cut in cuts), len(losses)]
    for begin, end in itertools.pairwise(edges):
        if one_by_one and end - begin < 50:
            for step in range(begin, end):
                course.add(step, losses[step])
        else:
            course.add(range(begin, end), losses[begin:end])
    assert course.verdict() == judge_convergence(range(len(losses)), losses, 10, warmup_steps=7, total_steps=2000)


def test_a_resumed_run_is_judged_by_what_came_after_the_resumption() -> None:
    """Told from step 1501 on again, after numbers that were not finite: all but at most a cell of it is the same."""
    losses = (1 + 0.1 * _noise(6, 3000, 0)).tolist()
    course = LossCourse(10)
    course.add(range(1, 2001), losses[:1600] + [math.nan] * 400)
    assert course.verdict().first_non_finite_step == 1601
    course.add(range(1501, 3001), losses[1500:])
    whole = judge_convergence(range(1, 3001), losses, 10)
    assert course.verdict() == whole
    course.add([2995, 2996], [losses[2994], losses[2995]])
    assert course.verdict().num_steps == 2992  # those of 2991 to 2994 shared a cell with 2995


def test_a_course_refuses_steps_without_losses() -> None:
    with pytest.raises(ValueError, match="2 steps for 1 losses"):
        LossCourse().add([1, 2], [0.5])


@pytest.mark.parametrize(
    ("level", "total_steps", "change", "verdict"),
    [
        (1.0, 2000, 0.0, ConvergenceVerdict.STUCK),
        (1.015, 2000, 0.0, ConvergenceVerdict.STUCK),
        (1.03, 2000, 0.0, ConvergenceVerdict.PLATEAU),
        (0.9, 2000, 0.0, ConvergenceVerdict.PLATEAU),
        (1.0, 4000, 0.0, ConvergenceVerdict.PLATEAU),  # no fifth of the steps yet
        (1.0, None, 0.0, ConvergenceVerdict.PLATEAU),
        (1.05, 2000, -0.06, ConvergenceVerdict.IMPROVING),
        (1.02, 2000, -0.03, ConvergenceVerdict.UNDECIDED),  # it falls, perhaps by what matters
    ],
)
def test_a_loss_that_rests_at_that_of_guessing_is_stuck(
    level: float, total_steps: int | None, change: float, verdict: ConvergenceVerdict
) -> None:
    losses = math.log(10) * (level + 0.005 * _noise(7, 600, 0) + change * np.arange(600) / 600)
    found = judge_convergence(range(1, 601), losses.tolist(), 10, total_steps=total_steps)
    assert found.verdict is verdict


def _looked_at(losses: NDArray[np.float64]) -> dict[ConvergenceVerdict, int]:
    """The step at which each verdict was first given, looking again whenever a tenth more steps were taken."""
    course, at = LossCourse(10), 0
    first: dict[ConvergenceVerdict, int] = {}
    while at < len(losses):
        until = min(max(at + 20, int(at * 1.1)), len(losses))
        course.add(range(at, until), losses[at:until].tolist())
        at = until
        first.setdefault(course.lasting_verdict().verdict, at)
    return first


def test_looking_often_does_not_make_rest_a_trend() -> None:
    """40 flat runs, 45 looks each; 3 of 150 such runs were ever wrong, at which rate 5 of 40 come once in 900."""
    runs = [_looked_at(1 + 0.2 * _noise(seed, 3000, 0.9)) for seed in range(40)]
    assert sum(ConvergenceVerdict.WORSENING in run for run in runs) <= 4
    assert not any(ConvergenceVerdict.DIVERGED in run for run in runs)


def test_a_loss_that_still_falls_by_what_matters_is_never_stopped() -> None:
    """By 1.2 % of itself over each window, or more: none of 900 such runs was."""
    for seed in range(20):
        assert ConvergenceVerdict.PLATEAU not in _looked_at(1 - 6e-5 * np.arange(3000) + 0.01 * _noise(seed, 3000, 0))


def test_a_loss_that_rests_is_stopped_after_two_windows() -> None:
    for seed in range(10):
        first = _looked_at(1 + 2 * np.exp(-np.arange(3000) / 100) + 0.01 * _noise(seed, 3000, 0))
        assert 800 < first[ConvergenceVerdict.PLATEAU] <= 3000


@pytest.mark.parametrize("shape", [0.2, 0.05])
def test_rare_huge_losses_of_small_batches_are_no_divergence(shape: float) -> None:
    """Gamma noise: of 20 losses one makes the mean.

    At most 3 % of 100 such runs were called diverged at any look; judged on single blocks up to 92 % were.
    """
    fall = 0.3 + 2 * np.exp(-np.arange(2000) / 400)
    noise = [np.random.default_rng(seed).gamma(shape, 1 / shape, 2000) for seed in range(30)]
    assert sum(ConvergenceVerdict.DIVERGED in _looked_at(fall * n) for n in noise) <= 4


def test_a_divergence_under_such_noise_is_found() -> None:
    steps = np.arange(3000)
    course = 0.1 + 2 * np.exp(-steps / 300) + np.minimum(0.05 * np.exp((steps - 1500) / 100) * (steps > 1500), 8)
    for seed in range(10):
        first = _looked_at(course * np.random.default_rng(seed).gamma(0.2, 5, 3000))
        assert first[ConvergenceVerdict.DIVERGED] > 1500
