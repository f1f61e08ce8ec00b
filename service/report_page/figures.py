"""The plots as SVG whose colours are the page's, so that they follow light and dark."""

import io
import math
import re
from collections.abc import Callable, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter
from matplotlib.typing import RcKeyType

from service.jobs import MomentumReplay, RankFinding
from service.report_page.curves import Curve, has_points, layer_curves, score_curves
from service.report_page.record import PageRecord

_INK, _FAINT = "#010203", "#010204"
_LINES = tuple(f"#0102{number:02x}" for number in range(16, 22))
_MARKS = {_INK: "var(--ink)", _FAINT: "var(--faint)"} | {
    line: f"var(--line-{number})" for number, line in enumerate(_LINES)
}
"""Colours that nothing is drawn in: the page's own take their place."""

_STYLE: dict[RcKeyType, object] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "syncbn",
    "text.parse_math": False,  # a layer's name is no formula
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.titlesize": 9,
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
}

_WIDTH = 8.4  # inches
_RANKS_SHOWN = 32


def draw_losses(record: PageRecord) -> str:
    """The training loss, each step faintly, and its means over blocks; empty where there is nothing to draw."""
    steps = Curve("single steps", record.losses.steps, record.losses.values)
    means = record.block_means
    blocks = Curve(means.downsampled or "means", means.steps, means.values)
    if not has_points(steps):
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(steps.x, steps.y, color=_FAINT, linewidth=0.7, label=steps.name)
        if has_points(blocks):
            axes.plot(blocks.x, blocks.y, color=_LINES[0], marker="o", markersize=2.5, label=blocks.name)
        _finish(axes, "training loss, nats", [blocks if has_points(blocks) else steps])
        axes.legend()

    return _svg("loss", draw, 2.7)


def draw_scores(record: PageRecord) -> str:
    """Validation loss and accuracy, with stored and with population statistics."""
    evaluations = record.report.evaluations
    panels = [("loss, nats", score_curves(evaluations, "loss")), ("accuracy", score_curves(evaluations, "accuracy"))]
    return _draw_panels("scores", panels)


def draw_drift(record: PageRecord) -> str:
    """How far each layer's running statistics are from the population's, over steps."""
    panels = [
        ("mean shift, rms over channels, \u03c3", layer_curves(record.layers, "drift/rms_mean_shift")),
        ("variance ratio, mean |ln|, nats", layer_curves(record.layers, "drift/mean_abs_log_var_ratio")),
    ]
    return _draw_panels("drift", panels)


def draw_ranks(findings: Sequence[RankFinding]) -> str:
    """Each rank's largest difference from the others, as a share of what chance passes; of many the largest."""
    shares = [(finding, abs(finding.z) / finding.threshold) for finding in findings if finding.threshold > 0]
    finite = [(finding, share) for finding, share in shares if math.isfinite(share)]
    shown = sorted(sorted(finite, key=lambda pair: -pair[1])[:_RANKS_SHOWN], key=lambda pair: -pair[0].rank)
    if not shown:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        names = [f"rank {finding.rank}" for finding, _ in shown]
        axes.barh(names, [share for _, share in shown], height=0.6, color=_LINES[0])
        for row, (finding, _) in enumerate(shown):
            where = f"{finding.layer}, {finding.quantity} {finding.size:+.2g}"
            axes.text(1.01, row, where, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        axes.axvline(1.0, color=_LINES[1], linestyle="--", linewidth=1.2)
        axes.set_xlim(0, 1.1 * max(1.0, *(share for _, share in shown)))
        axes.set_xlabel("size of z over its threshold; beyond the dashed line it is no chance")

    return _svg("ranks", draw, 0.9 + 0.28 * len(shown))


def draw_replay(replay: MomentumReplay | None) -> str:
    """How far other momenta would have left the outputs of the worst layer off, by which the best is chosen."""
    candidates = sorted(replay.candidates, key=lambda c: c.momentum) if replay else []
    curve = Curve("", tuple(c.momentum for c in candidates), tuple(c.output_error for c in candidates))
    if replay is None or not has_points(curve):
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(curve.x, curve.y, color=_LINES[0], marker="o", markersize=3.5)
        for momentum, name, line, style in ((replay.used, "used", 1, "--"), (replay.best, "best", 2, ":")):
            label = f"{name}: {momentum:g}"
            axes.axvline(momentum, color=_LINES[line], linestyle=style, linewidth=1.2, label=label)
        axes.set_xscale("log")
        axes.set_xlabel("momentum")
        _write_plainly(axes.xaxis)
        axes.set_ylabel("outputs of the worst layer\noff by, \u03c3 (rms)")
        axes.set_ylim(bottom=0)
        axes.legend()

    return _svg("replay", draw, 2.6)


def _draw_panels(name: str, panels: Sequence[tuple[str, Sequence[Curve]]]) -> str:
    """Panels beside each other over the same steps, with one legend below both; empty where there are no lines."""
    filled = [(title, curves) for title, curves in panels if curves]
    if not filled:
        return ""

    def draw(figure: Figure) -> None:
        lines: dict[str, str] = {}
        handles: dict[str, Line2D] = {}
        for axes, (title, curves) in zip(figure.subplots(1, len(filled), squeeze=False)[0], filled, strict=True):
            for curve in curves:
                colour = lines.setdefault(curve.name, _LINES[len(lines) % len(_LINES)]) if curve.name else _FAINT
                marker = "o" if len(curve.x) <= 60 else None
                (line,) = axes.plot(
                    curve.x, curve.y, color=colour, marker=marker, markersize=2.5, zorder=2 if curve.name else 1
                )
                handles.setdefault(curve.name, line)
            _finish(axes, title, curves)
        named = sorted(handles.items(), key=lambda item: not item[0])  # those without a name last
        names = [name or "other layers" for name, _ in named]
        columns = 2 if max(map(len, names)) > 20 else 3
        figure.legend([line for _, line in named], names, loc="outside lower center", ncols=columns)

    return _svg(name, draw, 3.1)


def _finish(axes: Axes, title: str, curves: Sequence[Curve]) -> None:
    """Say what is drawn; what spans more than a factor of 50 is drawn by its logarithm."""
    axes.set_title(title, loc="left")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    values = [value for curve in curves for value in curve.y if math.isfinite(value)]
    if min(values) > 0 and max(values) > 50 * min(values):
        axes.set_yscale("log")
        _write_plainly(axes.yaxis)


def _write_plainly(axis: Axis) -> None:
    """Numbers beside a logarithmic axis without powers, which browsers would have to be told how to set."""
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _svg(name: str, draw: Callable[[Figure], None], height: float) -> str:
    """What ``draw`` puts on a figure, as an SVG element whose ids are its own among those of the page."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        figure.patch.set_visible(False)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_visible(False)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = written.getvalue()
    text = text[text.index("<svg") :].replace("xlink:href=", "href=")
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text, count=4)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for mark, colour in _MARKS.items():
        text = text.replace(mark, colour)
    return text
