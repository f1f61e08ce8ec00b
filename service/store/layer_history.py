"""Reading what is known of the BatchNorm layers over time: drift from the events, samples from their own table."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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

_Told = dict[str, Any]
"""What was told of one layer."""


@dataclass
class _Column:
    """One number of one layer as it was told: None where it was not."""

    steps: list[int] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)


_Columns = dict[tuple[str, str], _Column]
"""By layer and metric."""


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
    Cost: reads and parses all that was measured in the range, 0.07 to 0.2 ms for each sample of 19 layers,
    by how many numbers are asked for.
    """
    wanted = _wanted_metrics(metrics)
    layers: dict[str, bool] = {}  # and whether the pattern names it
    ends: dict[str, tuple[Sequence[_Told], Sequence[_Told]]] = {}
    columns: _Columns = {}
    for prefix, step, told in _measured(connection, job_id, first_step, last_step):
        layers |= {found["layer"]: fnmatchcase(found["layer"], layer) for found in told if found["layer"] not in layers}
        ends[prefix] = (ends.get(prefix, (told,))[0], told)
        _add(columns, wanted[prefix], prefix, step, [found for found in told if layers[found["layer"]]])
    if layers and not any(layers.values()):
        raise NotFound(f"{job_id} has no BatchNorm layer {layer!r}; it has {', '.join(layers)}")
    known = {name for prefix, first_and_last in ends.items() for name in _told_numbers(prefix, first_and_last)}
    chosen = {key: points for key, column in columns.items() if (points := _points(column))[0]}
    most = min(max_points, max(MAX_POINTS_TOGETHER // max(len(chosen), 1), MIN_POINTS))
    samples = newest_samples(connection, job_id, 1)
    replays = bodies_of_type(connection, job_id, "momentum_replay")
    return LayerHistory(
        layers=tuple(layers),
        metrics=tuple(name for name in LAYER_METRICS if name in known),
        series=tuple(_series(*key, *chosen[key], most) for key in sorted(chosen, key=_order(layers))),
        last_sample=samples[-1][1] if samples else None,
        momentum_replay=MomentumReplay.model_validate_json(replays[-1][1]) if replays else None,
    )


def _wanted_metrics(patterns: Sequence[str]) -> dict[str, list[str]]:
    """The fields that the patterns name, by the prefix of what they are of."""
    wanted: set[str] = set()
    for pattern in patterns:
        found = {name for name in LAYER_METRICS if fnmatchcase(name, pattern)}
        if not found:
            raise NotFound(f"layers have no metric {pattern!r}; they have {', '.join(LAYER_METRICS)}")
        wanted |= found
    return {
        prefix: [name.removeprefix(prefix) for name in LAYER_METRICS if name in wanted and name.startswith(prefix)]
        for prefix in (DRIFT_PREFIX, SAMPLE_PREFIX)
    }


def _measured(
    connection: Connection, job_id: str, first_step: int | None, last_step: int | None
) -> Iterator[tuple[str, int, Sequence[_Told]]]:
    """Prefix, step and layers of all that was measured; of a repeated step what the latest attempt told."""
    latest: dict[int, tuple[int, _Told]] = {}
    for attempt, body in bodies_of_type(connection, job_id, "drift"):
        told = json.loads(body)
        step = told["step"]
        inside = (first_step is None or step >= first_step) and (last_step is None or step <= last_step)
        if inside and (step not in latest or latest[step][0] <= attempt):
            latest[step] = (attempt, told)
    for step in sorted(latest):
        yield DRIFT_PREFIX, step, latest[step][1]["layers"]
    # One at a time: thousands of parsed samples would take seconds to keep.
    for step, told in raw_samples(connection, job_id, first_step, last_step):
        yield SAMPLE_PREFIX, step, told["layers"]


def _add(columns: _Columns, names: Sequence[str], prefix: str, step: int, told: Sequence[_Told]) -> None:
    for found in told:
        for name in names:
            key = found["layer"], prefix + name
            column = columns.get(key)
            if column is None:
                column = columns[key] = _Column()
            column.steps.append(step)
            column.values.append(found.get(name))


def _told_numbers(prefix: str, measured: Sequence[Sequence[_Told]]) -> set[str]:
    """The metrics that any layer has in these."""
    return {prefix + name for told in measured for found in told for name, value in found.items() if value is not None}


def _points(column: _Column) -> tuple[list[int], list[float]]:
    """Steps and values, less those without one."""
    told = [(step, float(value)) for step, value in zip(column.steps, column.values, strict=True) if value is not None]
    return [step for step, _ in told], [value for _, value in told]


def _order(layers: Mapping[str, object]) -> Callable[[tuple[str, str]], tuple[int, int]]:
    """By metric, then in order of execution."""
    places = {name: place for place, name in enumerate(layers)}
    return lambda key: (LAYER_METRICS.index(key[1]), places[key[0]])


def _series(layer: str, metric: str, steps: list[int], values: list[float], max_points: int) -> LayerMetricSeries:
    kept = downsample(np.array(values, np.float64), max_points).tolist()
    return LayerMetricSeries(
        layer=layer,
        metric=metric,
        steps=tuple(steps[i] for i in kept),
        values=tuple(values[i] for i in kept),
        num_points=len(steps),
        downsampled=None if len(kept) == len(steps) else "least and greatest value of each bucket of samples",
    )
