"""``syncbn report``, ``compare`` and ``bn``: what the records of jobs mean, as a file, a table or JSON."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from service.commands.connection import open_client
from service.commands.options import JobArgument, JsonOption
from service.commands.report_tables import layer_table, side_by_side_table
from service.errors import FieldProblem, InvalidRequest
from service.jobs import ComparedMetric

reports_app = typer.Typer()

_KINDS = (".html", ".json")


@reports_app.command()
def report(
    job: JobArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write: NAME.html, or NAME.json.")],
    as_json: JsonOption = False,
) -> None:
    """Write the report on a job, with plots: an HTML file that needs no network, or all of it as JSON."""
    # Here, because to import matplotlib takes longer than most commands.
    from service.report_page import read_record, render_page

    if output.suffix not in _KINDS:
        text = f"{output} must end in {' or '.join(_KINDS)}, which says what is written"
        raise InvalidRequest([FieldProblem("/output", "suffix_unknown", text)])
    with open_client() as client:
        record = read_record(client, job)
    written = render_page(record) if output.suffix == ".html" else record.model_dump_json(indent=1)
    try:
        output.write_text(written, encoding="utf-8")
    except OSError as error:
        text = f"{output} cannot be written: {error.strerror}"
        raise InvalidRequest([FieldProblem("/output", "cannot_be_written", text)]) from None
    typer.echo(json.dumps({"path": str(output)}) if as_json else f"wrote {output}")


@reports_app.command()
def compare(
    jobs: Annotated[list[str], typer.Argument(metavar="JOB JOB...", help="From 2 to 64 job ids.")],
    metric: Annotated[ComparedMetric, typer.Option(help="The score to compare.")] = ComparedMetric.ACCURACY,
    as_json: JsonOption = False,
) -> None:
    """Put jobs beside each other, and their settings against each other over seeds."""
    with open_client() as client:
        told = client.compare(jobs, metric)
    if as_json:
        typer.echo(told.model_dump_json())
        return
    console = Console()
    console.print(side_by_side_table(told))
    for left in told.left_out:
        console.print(f"{left.job_id} does not count: {left.why}", markup=False, highlight=False)
    for group in told.groups:
        console.print(f"{group.name}: {', '.join(group.job_ids)}", markup=False, highlight=False)
    console.print(told.sentence, markup=False, highlight=False)
    for comparison in told.comparisons:
        console.print(comparison.sentence, markup=False, highlight=False)


@reports_app.command()
def bn(
    job: JobArgument,
    layer: Annotated[str, typer.Option(help="Only these layers; * is any letters.")] = "*",
    metric: Annotated[
        list[str], typer.Option(help="Only these numbers, such as drift/rms_mean_shift or sample/*; repeatable.")
    ] = [],  # noqa: B006 - typer's way to say "none given"
    as_json: JsonOption = False,
) -> None:
    """Show the numbers of a job's BatchNorm layers: the first, the last, the least and the greatest of each."""
    with open_client() as client:
        told = client.layers(job, layer=layer, metrics=metric)
    if as_json:
        typer.echo(told.model_dump_json())
    else:
        Console().print(layer_table(told))
