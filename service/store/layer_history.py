"""Reading what is known of the BatchNorm layers over time: drift from the events, samples from their own table."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from sqlalchemy import Connection

from service.errors import NotFound
from service.jobs import (
    DRIFT_PREFIX,
    LAYER_METRICS,
    SAMPLE_PREFIX,
    LayerHistory,
    LayerMetricSeries,
    MomentumReplay,
)
from service.store.downsample import MIN_POINTS, downsample
from service.store.events import bodies_of_type
from service.store.layer_samples import newest_samples, raw_samples

MAX_POINTS_TOGETHER = 100_000
"""The most points of all series in one answer: some 2 MB."""

_KNOWN = frozenset(LAYER_METRICS)

_Points = dict[tuple[str, str], list[tuple[int, float]]]
"""By layer and metric, in order of steps."""


def layer_history(
    connection: Connection,
    job_id: str,
    layer: str,
    metrics: Sequence[str],
    first_step: int | None,
    last_step: int | None,
    max_points: int,
) -> LayerHistory:
    """The series of every layer and metric that the patterns name, between two steps, both included.

    ``*`` in a pattern stands for any letters. Each series has at most ``max_points`` points, and all together about
    `MAX_POINTS_TOGETHER`: extremes and non-finite values stay. Raises: NotFound where a pattern names nothing.
    Cost: reads and parses all that was measured in the range, some 0.2 ms for each sample of 20 layers.
    """
    wanted = _wanted_metrics(metrics)
    layers: dict[str, None] = {}
    points: _Points = {}
    for step, prefix, told in _measured(connection, job_id, first_step, last_step):
        layers |= dict.fromkeys(found["layer"] for found in told)
        _add_points(points, step, prefix, told)
    if layers and not any(fnmatchcase(name, layer) for name in layers):
        raise NotFound(f"{job_id} has no BatchNorm layer {layer!r}; it has {', '.join(layers)}")
    chosen = [key for key in points if fnmatchcase(key[0], layer) and key[1] in wanted]
    most = min(max_points, max(MAX_POINTS_TOGETHER // max(len(chosen), 1), MIN_POINTS))
    samples = newest_samples(connection, job_id, 1)
    replays = bodies_of_type(connection, job_id, "momentum_replay")
    return LayerHistory(
        layers=tuple(layers),
        metrics=tuple(name for name in LAYER_METRICS if any(metric == name for _, metric in points)),
        series=tuple(_series(*key, points[key], most) for key in sorted(chosen, key=_order(layers))),
        last_sample=samples[-1][1] if samples else None,
        momentum_replay=MomentumReplay.model_validate_json(replays[-1][1]) if replays else None,
    )


def _wanted_metrics(patterns: Sequence[str]) -> set[str]:
    wanted: set[str] = set()
    for pattern in patterns:
        found = {name for name in LAYER_METRICS if fnmatchcase(name, pattern)}
        if not found:
            raise NotFound(f"layers have no metric {pattern!r}; they have {', '.join(LAYER_METRICS)}")
        wanted |= found
    return wanted


def _measured(
    connection: Connection, job_id: str, first_step: int | None, last_step: int | None
) -> Iterator[tuple[int, str, list[dict[str, Any]]]]:
    """Step, prefix and layers of everything that was measured; of a repeated step what the latest attempt told."""
    latest: dict[int, tuple[int, dict[str, Any]]] = {}
    for attempt, body in bodies_of_type(connection, job_id, "drift"):
        told = json.loads(body)
        step = told["step"]
        inside = (first_step is None or step >= first_step) and (last_step is None or step <= last_step)
        if inside and (step not in latest or latest[step][0] <= attempt):
            latest[step] = (attempt, told)
    for step in sorted(latest):
        yield step, DRIFT_PREFIX, latest[step][1]["layers"]
    for step, told in raw_samples(connection, job_id, first_step, last_step):
        yield step, SAMPLE_PREFIX, told["layers"]


def _add_points(points: _Points, step: int, prefix: str, told: Sequence[Mapping[str, Any]]) -> None:
    for found in told:
        for name, value in found.items():
            if prefix + name in _KNOWN and value is not None:
                points.setdefault((found["layer"], prefix + name), []).append((step, float(value)))


def _order(layers: Mapping[str, None]) -> Callable[[tuple[str, str]], tuple[int, int]]:
    """By metric, then in order of execution."""
    places = {name: place for place, name in enumerate(layers)}
    return lambda key: (LAYER_METRICS.index(key[1]), places[key[0]])


def _series(layer: str, metric: str, points: Sequence[tuple[int, float]], max_points: int) -> LayerMetricSeries:
    steps, values = zip(*points, strict=True)
    kept = downsample(np.array(values, np.float64), max_points).tolist()
    return LayerMetricSeries(
        layer=layer,
        metric=metric,
        steps=tuple(steps[i] for i in kept),
        values=tuple(values[i] for i in kept),
        num_points=len(points),
        downsampled=None if len(kept) == len(points) else "least and greatest value of each bucket of samples",
    )
