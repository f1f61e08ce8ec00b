"""Numbers of BatchNorm layers over steps, as every reader gets them; and what names those numbers have."""

from types import NoneType
from typing import get_args

from service.jobs.fact import Telemetry
from service.jobs.job import View
from service.jobs.layer_facts import BatchNormSample, LayerDrift, LayerSample, MomentumReplay

DRIFT_PREFIX = "drift/"
SAMPLE_PREFIX = "sample/"

_NUMBERS = {int, float, bool, NoneType}


class LayerMetricSeries(View):
    """One number of one layer over steps; ``downsampled`` says how points were left out, where any were."""

    layer: str
    metric: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    num_points: int
    downsampled: str | None = None


class LayerHistory(View):
    """The BatchNorm layers of a job over time.

    ``layers``, in order of execution, and ``metrics`` are all that the job has numbers of; ``series`` are those asked
    for. ``drift/`` numbers are of `LayerDrift`, ``sample/`` numbers of `LayerSample`, where yes is 1 and no 0.
    """

    layers: tuple[str, ...]
    metrics: tuple[str, ...]
    series: tuple[LayerMetricSeries, ...]
    last_sample: BatchNormSample | None = None
    """The newest sample, with the findings about ranks of all samples so far."""
    momentum_replay: MomentumReplay | None = None
    """The newest replay of the running statistics with other momenta."""


def numbers_of(kind: type[Telemetry]) -> tuple[str, ...]:
    """The fields of a fact that are numbers to follow over time: no names, no lists, and no channel's index."""
    return tuple(
        name
        for name, field in kind.model_fields.items()
        if set(get_args(field.annotation) or (field.annotation,)) <= _NUMBERS and not name.endswith("_channel")
    )


LAYER_METRICS = (
    *(DRIFT_PREFIX + name for name in numbers_of(LayerDrift)),
    *(SAMPLE_PREFIX + name for name in numbers_of(LayerSample)),
)
"""Every number of a layer that there can be."""
