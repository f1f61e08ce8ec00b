"""Tables of layers over time and of jobs beside each other, for people."""

import math

from rich.markup import escape
from rich.table import Column, Table

from service.jobs import JobReport, LayerHistory, LayerMetricSeries, SideBySide


def layer_table(history: LayerHistory) -> Table:
    """One line for each number of each layer; a number that was not finite at some step says so."""
    names = ("points", "first", "last", "least", "greatest")
    table = Table("layer", "metric", *(Column(name, justify="right") for name in names), "", box=None)
    for series in history.series:
        finite = [value for value in series.values if math.isfinite(value)]
        extremes = (min(finite), max(finite)) if finite else (math.nan, math.nan)
        numbers = (series.values[0], series.values[-1], *extremes)
        table.add_row(
            escape(series.layer),
            series.metric,
            str(series.num_points),
            *(f"{number:.4g}" for number in numbers),
            _trouble(series),
        )
    return table


def side_by_side_table(told: SideBySide) -> Table:
    """One line for each job: where it stands, its last scores, and the three numbers' colours."""
    columns = ("job", "name", "state", "settings", "steps", "loss", "accuracy", "damage", "stale", "ranks", "loss is")
    group_of = {job_id: group.name for group in told.groups for job_id in group.job_ids}
    table = Table(Column(columns[0], no_wrap=True), *columns[1:], box=None)
    for report in told.reports:
        table.add_row(*_job_row(report, group_of.get(report.job_id, "-")))
    return table


def _job_row(report: JobReport, group: str) -> tuple[str, ...]:
    last = report.last_evaluation
    return (
        report.job_id,
        escape(report.name),
        str(report.state),
        escape(group),
        str(report.num_steps),
        "-" if last is None else f"{last.stored.loss:.4g}",
        "-" if last is None else f"{100 * last.stored.accuracy:.2f} %",
        str(report.drift.colour),
        str(report.stale.colour),
        str(report.ranks.colour),
        str(report.convergence.verdict),
    )


def _trouble(series: LayerMetricSeries) -> str:
    step = next(
        (step for step, value in zip(series.steps, series.values, strict=True) if not math.isfinite(value)), None
    )
    return "" if step is None else f"[red]not finite at step {step}[/]"
