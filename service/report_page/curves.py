"""What the plots show, as plain values: which lines there are, which stand out, and where there is nothing to draw."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from service.jobs import Evaluation, LayerHistory, LayerMetricSeries

MAX_NAMED = 6
"""Lines of so many layers can be told apart; the others are drawn faintly."""


@dataclass(frozen=True)
class Curve:
    """One line; without a ``name`` it is one of many in the background."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]


def has_points(curve: Curve) -> bool:
    """Whether any of it can be drawn."""
    return any(math.isfinite(value) for value in curve.y)


def score_curves(evaluations: Sequence[Evaluation], score: str) -> list[Curve]:
    """``loss`` or ``accuracy`` of the validation over steps: with stored statistics, population's, and of training."""
    steps = tuple(evaluation.step for evaluation in evaluations)
    curves = [
        Curve(f"validation, {kind} statistics", steps, tuple(getattr(getattr(e, kind), score) for e in evaluations))
        for kind in ("stored", "population")
    ]
    trained = [(e.step, getattr(e.train, score)) for e in evaluations if e.train is not None]
    if trained:
        curves.append(Curve("training images, population statistics", *map(tuple, zip(*trained, strict=True))))
    return [curve for curve in curves if has_points(curve)]


def layer_curves(history: LayerHistory, metric: str) -> list[Curve]:
    """One line for each layer, in order of execution; only those with the largest last values have names."""
    found = [series for series in history.series if series.metric == metric]
    largest = sorted(found, key=_last_size, reverse=True)[:MAX_NAMED]
    named = {series.layer for series in largest}
    curves = [Curve(s.layer if s.layer in named else "", s.steps, s.values) for s in found]
    return [curve for curve in curves if has_points(curve)]


def _last_size(series: LayerMetricSeries) -> float:
    return next((abs(value) for value in reversed(series.values) if math.isfinite(value)), -1.0)
