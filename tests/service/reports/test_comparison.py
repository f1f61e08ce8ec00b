"""Groups of runs over seeds: pairing, what few seeds can say, and how often chance is called better."""

import math

import numpy as np
import pytest

from service.jobs import ComparedMetric, ComparisonVerdict
from service.reports import RunScore, compare, final_score
from tests.service.reports.evaluations import evaluated

_ACCURACY = ComparedMetric.ACCURACY


def _runs(scores: list[float], first_seed: int = 0) -> list[RunScore]:
    return [RunScore(first_seed + n, score) for n, score in enumerate(scores)]


def test_the_final_score_is_the_median_of_the_last_five_and_not_the_best() -> None:
    runs = [evaluated(10 * n, accuracy=a) for n, a in enumerate([0.99, 0.99, 0.5, 0.6, 0.7, 0.8, 0.55])]
    assert final_score(runs, _ACCURACY) == 0.6
    assert final_score(runs[:2][::-1], _ACCURACY) == 0.99
    assert final_score([], _ACCURACY) is None
    diverged = [*runs, evaluated(90, loss=math.nan)]
    assert math.isnan(final_score(diverged, ComparedMetric.LOSS) or 0.0)


def test_matching_seeds_are_compared_pair_by_pair_in_any_order() -> None:
    """Six differences of 0.01 to 0.06: mean 0.035, p = 2 / 2^6 to 1e-12, although the runs themselves vary by 0.3."""
    base = [0.5, 0.8, 0.6, 0.7, 0.55, 0.75]
    better = [b + 0.01 * (n + 1) for n, b in enumerate(base)]
    (found,) = compare({"sync": _runs(better)[::-1], "local": _runs(base)}, _ACCURACY)
    assert found.paired
    assert found.verdict is ComparisonVerdict.FIRST_BETTER
    assert found.difference == pytest.approx(0.035, abs=1e-12)
    assert (found.p, found.smallest_p, found.level) == pytest.approx((2 / 64, 2 / 64, 0.95), abs=1e-12)
    assert found.low is not None
    assert found.high is not None
    assert 0.01 < found.low < 0.035 < found.high < 0.06
    assert found.sentence.startswith("sync is better")


def test_other_seeds_or_repeated_ones_are_compared_as_groups() -> None:
    base, better = [0.5, 0.51, 0.52, 0.53], [0.9, 0.91, 0.92, 0.93]
    (found,) = compare({"local": _runs(base), "sync": _runs(better, first_seed=9)}, _ACCURACY)
    assert not found.paired
    assert found.verdict is ComparisonVerdict.SECOND_BETTER
    assert found.p == pytest.approx(2 / 70, abs=1e-12)
    assert not compare({"a": [RunScore(1, 0.5)] * 2, "b": [RunScore(1, 0.6)] * 2}, _ACCURACY)[0].paired


def test_a_smaller_loss_is_better() -> None:
    worse = _runs([1.0 + n / 10 for n in range(6)])
    (found,) = compare({"a": worse, "b": _runs([0.5 + n / 20 for n in range(6)])}, ComparedMetric.LOSS)
    assert found.verdict is ComparisonVerdict.SECOND_BETTER


def test_three_seeds_can_never_claim_a_difference_and_are_told_so() -> None:
    (paired,) = compare({"a": _runs([0.9, 0.91, 0.92]), "b": _runs([0.1, 0.12, 0.13])}, _ACCURACY)
    assert paired.verdict is ComparisonVerdict.UNDECIDED
    assert "3 pairs of runs can never claim p < 0.05: 0.25 is the smallest" in paired.sentence
    assert "at least 6 seeds" in paired.sentence
    assert paired.level == 0.75
    (loose,) = compare({"a": _runs([0.9, 0.91, 0.92]), "b": _runs([0.1, 0.12, 0.13], 7)}, _ACCURACY)
    assert "0.1 is the smallest" in loose.sentence
    assert "at least 4 seeds" in loose.sentence


def test_several_comparisons_at_once_are_corrected_together() -> None:
    groups = {name: _runs([level + n / 1000 for n in range(6)]) for name, level in (("a", 0.5), ("b", 0.6), ("c", 0.7))}
    found = compare(groups, _ACCURACY)
    assert [(c.first, c.second) for c in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [c.adjusted_p for c in found] == pytest.approx([3 / 32, 3 / 32, 3 / 32], abs=1e-12)
    against = compare(groups, _ACCURACY, baseline="a")
    assert [(c.first, c.second, c.adjusted_p) for c in against] == [("b", "a", 2 / 32), ("c", "a", 2 / 32)]
    with pytest.raises(ValueError, match="baseline 'z' is none of the groups a, b, c"):
        compare(groups, _ACCURACY, baseline="z")


def test_a_run_that_diverged_is_named_and_never_left_out() -> None:
    (found,) = compare({"a": _runs([0.5, math.nan]), "b": _runs([0.5, 0.6])}, ComparedMetric.LOSS)
    assert found.verdict is ComparisonVerdict.UNDECIDED
    assert "a with seed 1" in found.sentence
    (empty,) = compare({"a": _runs([0.5]), "b": []}, ComparedMetric.LOSS)
    assert "b has no run" in empty.sentence


def test_one_run_each_has_a_difference_and_no_interval() -> None:
    (found,) = compare({"a": _runs([0.5]), "b": _runs([0.75])}, _ACCURACY)
    assert (found.difference, found.low, found.p, found.smallest_p) == (-0.25, None, 1.0, 1.0)


@pytest.mark.parametrize(("first_seed", "least"), [(0, 0.88), (50, 0.9)])
def test_the_interval_holds_the_true_difference_about_as_often_as_it_says(first_seed: int, least: float) -> None:
    """Eight normal runs each, 150 times: 95 % less three standard errors is 89.7 %."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(150):
        a, b = rng.standard_normal((2, 8))
        (found,) = compare({"a": _runs(a.tolist()), "b": _runs(b.tolist(), first_seed)}, _ACCURACY)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0 <= found.high
    assert held / 150 >= least
