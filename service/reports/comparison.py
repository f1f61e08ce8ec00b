"""Says which of two groups of runs, over seeds, did better, and what so few seeds can say at all."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from service.jobs import ComparedMetric, Comparison, ComparisonVerdict, Evaluation
from service.reports.blocks import Series
from service.reports.permutation import holm, paired_p, smallest_p, unpaired_p

NUM_LAST = 5
ERROR_RATE = 0.05
NUM_RESAMPLES = 10_000
SEED = 0
_LOSSES = (ComparedMetric.LOSS, ComparedMetric.POPULATION_LOSS)


@dataclass(frozen=True)
class RunScore:
    """What one run came to, and the seed of its weights and its order of images."""

    seed: int
    score: float


def final_score(evaluations: Sequence[Evaluation], metric: ComparedMetric) -> float | None:
    """The median of the last five evaluations, never the best one: the best of many is partly luck.

    Of fewer evaluations the median of all; None of none. Where a step comes twice the later evaluation counts.
    NaN where one of them is: a run that diverged has no score.
    """
    by_step = {evaluation.step: evaluation for evaluation in evaluations}
    last = [_score(by_step[step], metric) for step in sorted(by_step)[-NUM_LAST:]]
    if not last or any(map(math.isnan, last)):
        return math.nan if last else None
    return float(np.median(last))


def compare(
    groups: Mapping[str, Sequence[RunScore]], metric: ComparedMetric, *, baseline: str | None = None
) -> tuple[Comparison, ...]:
    """Each pair of groups, or each other group with ``baseline``; one is better only by its p after Holm's correction.

    Pairs are compared seed by seed where both groups hold the same seeds, each once: the exact sign-flip test of the
    mean difference; else by the exact permutation test of the difference of means. All comparisons together name a
    better group where there is none in at most 5 % of cases. A run without a finite score makes its comparisons
    undecided; it is not left out, since it may have diverged.

    The interval is that of the bootstrap with tails widened for few runs; its ``level`` is 95 %, or 1 - ``smallest_p``
    where that is less: the extremes of so few runs hold no more. Measured on 400 samples each of 2, 3, 4, 5, 6, 8,
    10 and 20 runs, paired and not: of a normal distribution it held the true difference in at most 5 points less
    than ``level``, of an exponential one in at most 10 less.
    Raises: ValueError where ``baseline`` is none of the groups.
    Source: Hesterberg 2015, "What teachers should know about the bootstrap", section 4.3, for the tails.
    """
    if baseline is not None and baseline not in groups:
        raise ValueError(f"baseline {baseline!r} is none of the groups {', '.join(groups)}")
    pairs = (
        list(combinations(groups, 2)) if baseline is None else [(name, baseline) for name in groups if name != baseline]
    )
    tests = [_p(groups[a], groups[b]) for a, b in pairs]
    known = [p for p in tests if p is not None]
    adjusted = iter(holm(known))
    return tuple(
        _compared(a, groups[a], b, groups[b], metric, p, next(adjusted) if p is not None else None)
        for (a, b), p in zip(pairs, tests, strict=True)
    )


def _score(evaluation: Evaluation, metric: ComparedMetric) -> float:
    match metric:
        case ComparedMetric.ACCURACY:
            return evaluation.stored.accuracy
        case ComparedMetric.LOSS:
            return evaluation.stored.loss
        case ComparedMetric.POPULATION_ACCURACY:
            return evaluation.population.accuracy
        case ComparedMetric.POPULATION_LOSS:
            return evaluation.population.loss


def _are_paired(first: Sequence[RunScore], second: Sequence[RunScore]) -> bool:
    seeds = {run.seed for run in first}
    return seeds == {run.seed for run in second} and len(seeds) == len(first) == len(second)


def _in_order(runs: Sequence[RunScore]) -> Series:
    return np.array([run.score for run in sorted(runs, key=lambda run: run.seed)])


def _p(first: Sequence[RunScore], second: Sequence[RunScore]) -> float | None:
    a, b = _in_order(first), _in_order(second)
    if not (len(a) and len(b) and np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    return paired_p((a - b).tolist()) if _are_paired(first, second) else unpaired_p(a.tolist(), b.tolist())


def _compared(
    first_name: str,
    first: Sequence[RunScore],
    second_name: str,
    second: Sequence[RunScore],
    metric: ComparedMetric,
    p: float | None,
    adjusted_p: float | None,
) -> Comparison:
    paired = _are_paired(first, second)
    a, b = _in_order(first), _in_order(second)
    if p is None or adjusted_p is None:
        return Comparison(
            first=first_name,
            second=second_name,
            metric=metric,
            verdict=ComparisonVerdict.UNDECIDED,
            sentence=_no_score_sentence(first_name, first, second_name, second),
            paired=paired,
            num_first=len(a),
            num_second=len(b),
        )
    difference = float(a.mean() - b.mean())
    interval = _paired_interval(a - b) if paired else _unpaired_interval(a, b)
    comparison = Comparison(
        first=first_name,
        second=second_name,
        metric=metric,
        verdict=_verdict(difference, adjusted_p, metric),
        sentence="",
        paired=paired,
        num_first=len(a),
        num_second=len(b),
        mean_first=float(a.mean()),
        mean_second=float(b.mean()),
        difference=difference,
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        level=interval[2] if interval else None,
        p=p,
        adjusted_p=adjusted_p,
        smallest_p=smallest_p(len(a), len(b), paired=paired),
    )
    return comparison.model_copy(update={"sentence": _sentence(comparison)})


def _verdict(difference: float, adjusted_p: float, metric: ComparedMetric) -> ComparisonVerdict:
    if adjusted_p >= ERROR_RATE or difference == 0:
        return ComparisonVerdict.UNDECIDED
    first_better = (difference < 0) is (metric in _LOSSES)
    return ComparisonVerdict.FIRST_BETTER if first_better else ComparisonVerdict.SECOND_BETTER


def _paired_interval(differences: Series) -> tuple[float, float, float] | None:
    n = len(differences)
    if n < 2:
        return None
    level = 1 - max(ERROR_RATE, smallest_p(n, n, paired=True))
    picked = np.random.default_rng(SEED).integers(0, n, (NUM_RESAMPLES, n))
    return _tails(differences[picked].mean(axis=1), level, n, n - 1)


def _unpaired_interval(a: Series, b: Series) -> tuple[float, float, float] | None:
    if min(len(a), len(b)) < 2:
        return None
    generator = np.random.default_rng(SEED)
    means = [x[generator.integers(0, len(x), (NUM_RESAMPLES, len(x)))].mean(axis=1) for x in (a, b)]
    parts = [float(x.var(ddof=1)) / len(x) for x in (a, b)]
    spread = sum(part**2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True))
    freedom = sum(parts) ** 2 / spread if spread else float(len(a) + len(b) - 2)
    n = min(len(a), len(b))
    level = 1 - max(ERROR_RATE, smallest_p(len(a), len(b), paired=False))
    return _tails(means[0] - means[1], level, n, freedom)


def _tails(means: Series, level: float, n: int, freedom: float) -> tuple[float, float, float]:
    """The interval between quantiles as far out as Student's t, with n for the n - 1 of the bootstrap's variance."""
    far_out = math.sqrt(n / (n - 1)) * float(stats.t.ppf((1 + level) / 2, freedom))
    tail = float(stats.norm.sf(far_out))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high), level


def _sentence(c: Comparison) -> str:
    assert c.difference is not None
    assert c.adjusted_p is not None
    assert c.smallest_p is not None
    what = c.metric.replace("_", " ")
    runs = f"{c.num_first} pairs of runs" if c.paired else f"{c.num_first} and {c.num_second} runs"
    measured = f"the {what} of {c.first} minus that of {c.second} is {c.difference:+.4g}"
    if c.low is not None and c.level is not None:
        measured += f" ({100 * c.level:.4g} % interval {c.low:+.4g} to {c.high:+.4g})"
    measured += f" over {runs}, p = {c.adjusted_p:.2g}"
    match c.verdict:
        case ComparisonVerdict.FIRST_BETTER:
            return f"{c.first} is better: {measured}."
        case ComparisonVerdict.SECOND_BETTER:
            return f"{c.second} is better: {measured}."
        case _ if c.smallest_p >= ERROR_RATE:
            needed = _needed(paired=c.paired)
            return (
                f"Undecided: {measured}. {runs} can never claim p < {ERROR_RATE}: {c.smallest_p:.2g} is the smallest "
                f"they reach. Train at least {needed} seeds of each."
            )
        case _:
            return (
                f"Undecided: {measured}; the smallest that so many can reach is {c.smallest_p:.2g}. Train more seeds."
            )


def _needed(*, paired: bool) -> int:
    return next(n for n in range(1, 64) if smallest_p(n, n, paired=paired) < ERROR_RATE)


def _no_score_sentence(first_name: str, first: Sequence[RunScore], second_name: str, second: Sequence[RunScore]) -> str:
    bad = [
        f"{name} with seed {run.seed}"
        for name, runs in ((first_name, first), (second_name, second))
        for run in runs
        if not math.isfinite(run.score)
    ]
    if not bad:
        return f"Undecided: {second_name if first else first_name} has no run with an evaluation."
    return (
        f"Undecided: {', '.join(bad)} has no finite score, and a mean without it would hide that. Compare accuracies."
    )
