"""The report as people read it on a terminal."""

from rich.console import Console

from service.display import comparison_table, report_panel
from service.jobs import JobReport
from service.reports import report_job
from tests.service.reports.records import (
    drift_of,
    evaluation_of,
    finding_of,
    layer_of,
    record_of,
    sample_of,
    sampled,
    spec_of,
)


def _text(report: JobReport) -> str:
    """The panel in lines wide enough for each row, without its frame."""
    console = Console(width=1000)
    with console.capture() as capture:
        console.print(report_panel(report))
    return "\n".join(" ".join(line.strip("│╭╮╰╯─ ").split()) for line in capture.get().splitlines())


def test_the_three_numbers_come_first_then_what_to_do() -> None:
    sample = sample_of(finding_of(2, -9.0, -0.7, layer="[bold]norm"), layers=(layer_of(exploding=(1, 2)),))
    record = record_of(
        spec_of(num_workers=4, name="a name"),
        evaluations=[evaluation_of(0.3)],
        drift=[drift_of(0.4, initial_weight=0.0)],
        samples=sampled(sample),
    )
    lines = _text(report_job(record)).splitlines()
    assert lines[0] == "job_1 a name (succeeded)"
    assert [line.partition(":")[0] for line in lines[1:4]] == ["damage red", "stale red", "ranks red"]
    assert "found (red) 2 of 10 channels of layer layers.0 are exploding: 1, 2." in lines
    assert "in layer [bold]norm, channel 3" in lines[3]
    assert any(line.startswith("to do 1 Shuffle the images over all ranks") for line in lines)
    assert any(line.startswith("to do 2 Recompute the statistics") for line in lines)
    assert "population statistics accuracy 90.0 %, loss 0.4" in lines
    assert len(lines) == len(set(lines))


def test_a_job_that_has_not_begun_is_shown_as_undecided() -> None:
    text = _text(report_job(record_of(losses=())))
    for number in ("damage", "stale", "ranks"):
        assert f"{number} undecided:" in text
    assert "found" not in text
    assert "to do" not in text


def test_reports_stand_side_by_side() -> None:
    reports = [report_job(record_of(evaluations=[evaluation_of(damage)])) for damage in (0.0, 0.3)]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(comparison_table(reports, ["one", "other"]))
    colours = next(line for line in capture.get().splitlines() if "running statistics are" in line)
    assert colours.index("green") < colours.index("red")
