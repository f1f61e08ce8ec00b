"""Overfitting: planted courses, the widened interval, and how often rest is taken for a rise."""

import math

import numpy as np
import pytest
from scipy import stats

from service.jobs import Evaluation, OverfittingVerdict
from service.reports import judge_overfitting
from tests.service.reports.evaluations import evaluated


def _run(rise: float, half_width: float, train_change: float | None, num: int = 5) -> list[Evaluation]:
    """The best of ``num`` evaluations is the one at step 100; the last is at step 100 * num."""
    early = [evaluated(100 * n, train=0.5) for n in range(1, num)]
    train = None if train_change is None else 0.5 + train_change
    best = (100, rise, rise - half_width, rise + half_width)
    return [*early, evaluated(100 * num, loss=1 + rise, train=train, best=best)]


@pytest.mark.parametrize(
    ("rise", "half_width", "train_change", "verdict", "words"),
    [
        (0.2, 0.05, -0.1, OverfittingVerdict.OVERFITTING, "Stop at step 100"),
        (0.2, 0.05, 0.0, OverfittingVerdict.OVERFITTING, "Overfitting"),
        (0.2, 0.05, 0.1, OverfittingVerdict.NONE, "training itself gets worse"),
        (0.2, 0.05, None, OverfittingVerdict.UNDECIDED, "not recorded"),
        (0.2, 0.15, -0.1, OverfittingVerdict.UNDECIDED, "1000 validation images"),  # widened by 1.43
        (0.005, 0.001, -0.1, OverfittingVerdict.NONE, "does not matter"),
        (-0.1, 0.01, -0.1, OverfittingVerdict.NONE, "best validation loss so far"),
        (math.nan, 0.01, -0.1, OverfittingVerdict.UNDECIDED, "not finite"),
    ],
)
def test_a_rise_counts_if_it_is_sure_matters_and_training_does_not_rise_too(
    rise: float, half_width: float, train_change: float | None, verdict: OverfittingVerdict, words: str
) -> None:
    found = judge_overfitting(_run(rise, half_width, train_change))
    assert found.verdict is verdict
    assert words in found.sentence


def test_the_numbers_are_those_of_the_two_evaluations() -> None:
    """Ten pairs of five evaluations: normal quantile of 0.025 / 10 over that of 0.025, to 1e-9."""
    found = judge_overfitting(_run(0.2, 0.05, -0.1))
    stretch = stats.norm.isf(0.0025) / stats.norm.isf(0.025)
    assert (found.best_step, found.step, found.num_evaluations) == (100, 500, 5)
    assert found.interval is not None
    assert found.interval.low == pytest.approx(0.2 - 0.05 * stretch, abs=1e-9)
    assert found.train_change == pytest.approx(-0.1, abs=1e-9)
    assert found.gap == pytest.approx(1.2 - 0.4, abs=1e-9)


def test_one_evaluation_or_none_is_undecided() -> None:
    assert judge_overfitting([]).verdict is OverfittingVerdict.UNDECIDED
    assert judge_overfitting([evaluated(1)]).verdict is OverfittingVerdict.UNDECIDED


def test_validation_losses_that_rest_are_rarely_called_overfitting_at_any_look() -> None:
    """300 runs of 12 evaluations, looked at after each: 5 % is promised, and 9 % is 3 standard errors more."""
    rng, false_alarms = np.random.default_rng(0), 0
    for _ in range(300):
        losses = 1 + 0.5 * rng.standard_normal((12, 100))
        run: list[Evaluation] = []
        for n, images in enumerate(losses):
            means = losses[:n].mean(axis=1)
            best = None
            if n:
                difference = images - losses[means.argmin()]
                half_width = 1.96 * difference.std(ddof=1) / 10
                rise = float(difference.mean())
                best = (int(means.argmin()) + 1, rise, rise - half_width, rise + half_width)
            run.append(evaluated(n + 1, loss=float(images.mean()), train=0.5, best=best))
            if judge_overfitting(run).verdict is OverfittingVerdict.OVERFITTING:
                false_alarms += 1
                break
    assert false_alarms / 300 < 0.09
