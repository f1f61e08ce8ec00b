"""Says which layer was the first to change before something happened to a run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from service.jobs import Attribution, BatchNormSample, Drift, LayerChange, LayerDrift, LayerSample
from service.reports.blocks import Series

NUM_BEFORE = 20
FREEDOM = 5
ERROR_RATE = 0.05
TO_SIGMA = 1.4826
"""The median absolute deviation of a normal distribution, times this, is its standard deviation."""
ROUNDING = 1e-9
"""Relative: a number that differs by less is the same."""
DRIFT_METRICS = ("rms_mean_shift", "mean_abs_log_var_ratio", "output_error", "rank_disagreement")
SAMPLE_METRICS = ("design_effect", "max_abs_z", "num_dead", "num_collapsed", "num_exploding", "num_muted")


@dataclass(frozen=True)
class LayerSeries:
    """One number of one layer over steps, which rise; ``depth`` counts layers in order of execution from 0."""

    layer: str
    depth: int
    metric: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


def first_to_change(
    series: Sequence[LayerSeries], *, first_step: int | None = None, last_step: int | None = None
) -> Attribution:
    """Each layer's first value between the two steps that the 20 values before it do not explain, earliest first.

    A value is explained while its robust z, the distance from the median of those before in their scaled median
    absolute deviations, is below a threshold that grows with the number of values looked at. Of values that are all
    above 0 the logarithms must not explain it either; a value that is no number is never explained. Equal steps are
    put in order of depth, then of z. What changed first need not be the cause.

    The threshold is Student's t on 5 degrees at Bonferroni's level: its tail is just above that of the z of a random
    walk, and well above that of independent values. Measured on 200 healthy runs of 18 series of 80 values each,
    a layer was named in 0 % for normal and lognormal values, 1 % at correlation 0.9, 2.5 % for random walks. The
    price: a jump must be of about 13 standard deviations.
    Cost: O(values).
    """
    window = (-math.inf if first_step is None else first_step, math.inf if last_step is None else last_step)
    num_looks = sum(window[0] <= step <= window[1] for s in series for step in s.steps[NUM_BEFORE:])
    threshold = float(stats.t.isf(ERROR_RATE / 2 / max(num_looks, 1), FREEDOM))
    found = [change for s in series if (change := _first_change(s, window, threshold)) is not None]
    found.sort(key=lambda change: (change.step, change.depth, -change.robust_z))
    changes = tuple({change.layer: change for change in reversed(found)}.values())[::-1]
    return Attribution(
        sentence=_sentence(changes, num_looks), threshold=threshold, num_looks=num_looks, changes=changes
    )


def drift_series(samples: Sequence[Drift]) -> list[LayerSeries]:
    """The drift of each layer over steps, one series for each of `DRIFT_METRICS`."""
    return _series({sample.step: sample.layers for sample in samples}, DRIFT_METRICS)


def sample_series(samples: Sequence[BatchNormSample]) -> list[LayerSeries]:
    """What each layer saw over steps, one series for each of `SAMPLE_METRICS`."""
    return _series({sample.step: sample.layers for sample in samples}, SAMPLE_METRICS)


def _series(samples: Mapping[int, Sequence[LayerDrift | LayerSample]], metrics: Sequence[str]) -> list[LayerSeries]:
    points: dict[tuple[str, int, str], list[tuple[int, float]]] = {}
    for step in sorted(samples):
        for depth, layer in enumerate(samples[step]):
            for metric in metrics:
                points.setdefault((layer.layer, depth, metric), []).append((step, float(getattr(layer, metric))))
    return [LayerSeries(*key, *map(tuple, zip(*series, strict=True))) for key, series in points.items()]


def _first_change(series: LayerSeries, window: tuple[float, float], threshold: float) -> LayerChange | None:
    values = np.asarray(series.values, np.float64)
    for index in range(NUM_BEFORE, len(values)):
        if not window[0] <= series.steps[index] <= window[1]:
            continue
        z = robust_z(values[index - NUM_BEFORE : index], float(values[index]))
        if z > threshold:
            return LayerChange(
                layer=series.layer,
                depth=series.depth,
                metric=series.metric,
                step=series.steps[index],
                value=float(values[index]),
                robust_z=z,
            )
    return None


def robust_z(before: Series, value: float) -> float:
    """How far ``value`` is from the median of the values before, in their scaled median absolute deviations.

    Infinite where the value is not finite, or where half of those before are equal and it differs; 0 where one of those
    before is not finite, since then the change was earlier. Of positive values the smaller z of themselves and of
    their logarithms.
    """
    if not np.isfinite(before).all():
        return 0.0
    if not math.isfinite(value):
        return math.inf
    if value > 0 and (before > 0).all():
        return min(_distance(before, value), _distance(np.log(before), math.log(value)))
    return _distance(before, value)


def _distance(before: Series, value: float) -> float:
    median = float(np.median(before))
    deviation = TO_SIGMA * float(np.median(np.abs(before - median)))
    distance = abs(value - median)
    if distance <= ROUNDING * max(abs(median), abs(value)):
        return 0.0
    return distance / deviation if deviation > 0 else math.inf


def _sentence(changes: Sequence[LayerChange], num_looks: int) -> str:
    if not num_looks:
        return f"Undecided: a layer is judged from its value number {NUM_BEFORE + 1} on; sample the layers more often."
    if not changes:
        return f"No layer changed by more than chance explains, in {num_looks} values."
    first = changes[0]
    others = f"; {len(changes) - 1} more layers followed" if len(changes) > 1 else ""
    return (
        f"The first to change was {first.layer} at step {first.step}: its {first.metric} of {first.value:.3g} is "
        f"{first.robust_z:.3g} robust standard deviations from the {NUM_BEFORE} values before{others}. First to change "
        "need not be the cause."
    )
