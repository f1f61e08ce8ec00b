"""Joins words, plots and tables into the page. Everything that a job says of itself is escaped."""

import math
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from service.jobs import JobReport, LayerHistory
from service.report_page.figures import draw_drift, draw_losses, draw_ranks, draw_replay, draw_scores
from service.report_page.record import PageRecord

_LAYER_COLUMNS = {
    "drift/rms_mean_shift": "mean shift, rms, \u03c3",
    "drift/expected_mean_shift": "of it by chance",
    "drift/mean_abs_log_var_ratio": "variance ratio, nats",
    "drift/output_error": "output error",
    "drift/rank_disagreement": "ranks' buffers differ by, \u03c3",
    "sample/max_abs_z": "batch against running mean, z",
    "sample/design_effect": "design effect",
}
_EVALUATIONS_SHOWN = 20


def render_page(record: PageRecord) -> str:
    """The page as HTML. Cost: about a second, most of it for the plots."""
    figures = (
        ("Training loss", draw_losses(record), "No step has been told yet."),
        ("Validation", draw_scores(record), "There is no evaluation with finite scores."),
        ("Drift of the running statistics", draw_drift(record), "No drift has been measured."),
        ("Ranks against each other", draw_ranks(record.report.ranks.findings), "No ranks were compared."),
        ("Momentum, replayed", draw_replay(record.layers.momentum_replay), "No replay is recorded."),
    )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "percent": _percent, "duration": _duration, "words": _words}
    return environment.get_template("page.html").render(
        report=record.report,
        three=_three_numbers(record.report),
        figures=figures,
        columns=tuple(_LAYER_COLUMNS.values()),
        layers=_layer_rows(record.layers),
        evaluations=record.report.evaluations[-_EVALUATIONS_SHOWN:],
    )


def _three_numbers(report: JobReport) -> tuple[tuple[str, str, str, str], ...]:
    """Title, the number, colour and sentence of what is looked at first."""
    damage, stale, ranks = report.drift, report.stale, report.ranks
    loss = "" if damage.loss_damage is None else f"{damage.loss_damage:+.3g} nats"
    shift = "" if stale.worst_layer is None else f"{_number(stale.worst_layer.rms_mean_shift)} \u03c3"
    share = abs(ranks.worst.z) / ranks.worst.threshold if ranks.worst and ranks.worst.threshold > 0 else math.nan
    largest = f"{_number(share)} \u00d7 threshold" if math.isfinite(share) else ""
    return (
        ("Damage by the stored statistics", loss, damage.colour, damage.sentence),
        ("Staleness of the worst layer", shift, stale.colour, stale.sentence),
        ("Largest difference of a rank", largest, ranks.colour, ranks.sentence),
    )


def _layer_rows(history: LayerHistory) -> list[tuple[str, Sequence[float | None]]]:
    """The last value of each column of each layer."""
    last = {(s.layer, s.metric): s.values[-1] for s in history.series if s.values}
    rows = [(layer, [last.get((layer, metric)) for metric in _LAYER_COLUMNS]) for layer in history.layers]
    return [(layer, values) for layer, values in rows if any(value is not None for value in values)]


def _number(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "\u2013" if share is None else f"{100 * share:.1f} %"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "\u2013"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _words(name: str) -> str:
    """``rank_differs`` as words."""
    return name.replace("_", " ")
