"""Everything that the page shows, read from the service: also what `syncbn report -o FILE.json` writes."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from service.client import Client
from service.jobs import JobReport, LayerHistory, MetricSeries, View

LOSS = "train/loss"

MAX_BLOCKS = 200
_BLOCKS = 40
_WINDOW = 5000
"""As many steps as one answer can tell exactly."""
MAX_EXACT_STEPS = 100 * _WINDOW
"""Means of longer runs would take too many requests."""

_METRICS = ("drift/*", "sample/max_abs_z", "sample/design_effect", "sample/buffers_equal")


class PageRecord(View):
    """A job's report, its training loss, thinned and as means of blocks of steps, and its layers over time."""

    report: JobReport
    losses: MetricSeries
    block_means: MetricSeries
    """Each told at the last step of its block; empty of a run of more than half a million steps."""
    layers: LayerHistory


def read_record(client: Client, job_id: str) -> PageRecord:
    """The record as it stands now. Cost: some requests, and one for each 5000 steps. Raises: ServiceError."""
    report = client.report(job_id)
    losses = client.metric(job_id, LOSS, max_points=1000)
    return PageRecord(
        report=report,
        losses=losses,
        block_means=_block_means(client, report, losses),
        layers=client.layers(job_id, metrics=_METRICS, max_points=300),
    )


def _block_means(client: Client, report: JobReport, losses: MetricSeries) -> MetricSeries:
    told = np.array(losses.steps)
    exact = losses.num_points <= MAX_EXACT_STEPS
    windows = [] if not exact else list(_windows(client, report.job_id, int(told.max(initial=0))))
    steps = np.concatenate([np.empty(0, np.int64), *(steps for steps, _ in windows)])
    values = np.concatenate([np.empty(0), *(values for _, values in windows)])
    length = _block_steps(report, len(steps))
    # An incomplete first block, so that the last one ends with the run.
    edges = np.arange(len(steps), 0, -length)[::-1]
    starts = np.maximum(edges - length, 0)
    means = [float(np.mean(values[start:end])) for start, end in zip(starts, edges, strict=True)]
    return MetricSeries(
        name=LOSS,
        rank=None,
        steps=tuple(steps[edges - 1].tolist()),
        values=tuple(means),
        num_points=len(steps),
        downsampled=f"means of {length} consecutive steps",
    )


def _windows(client: Client, job_id: str, last_step: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    for first in range(0, last_step + 1, _WINDOW):
        told = client.metric(job_id, LOSS, first_step=first, last_step=first + _WINDOW - 1, max_points=_WINDOW)
        yield np.array(told.steps, np.int64), np.array(told.values, np.float64)


def _block_steps(report: JobReport, num_steps: int) -> int:
    """Those that the verdict on convergence was judged on, unless they would be too many to see."""
    judged = report.convergence.block_steps
    return judged if judged and num_steps <= judged * MAX_BLOCKS else max(-(-num_steps // _BLOCKS), 1)
