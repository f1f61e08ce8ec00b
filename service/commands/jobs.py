"""``syncbn submit``, ``plan``, ``list``, ``show``, ``watch`` and ``logs``: jobs over REST."""

import json
from collections.abc import Iterator
from typing import Annotated

import typer
from pydantic import BaseModel
from rich.console import Console

from service import display
from service.client import Client
from service.commands.connection import open_client
from service.commands.options import JobArgument, JsonOption, SpecArgument
from service.commands.spec_file import read_spec
from service.jobs import JobState, LogRecord

jobs_app = typer.Typer()


@jobs_app.command()
def submit(
    spec_file: SpecArgument,
    assignments: Annotated[
        list[str], typer.Option("--set", help="Change one field: --set num_workers=4 --set optimizer.momentum=0.5")
    ] = [],  # noqa: B006 - typer's way to say "none given"
    idempotency_key: Annotated[str | None, typer.Option(help="The same key never starts a second job.")] = None,
    follow: Annotated[bool, typer.Option("--watch", help="Stay and watch the job.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Submit a training job."""
    spec = read_spec(spec_file, assignments)
    with open_client() as client:
        job = client.submit(spec, idempotency_key=idempotency_key)
        if as_json:
            _print_json(job)
        else:
            Console().print(f"submitted [bold]{job.id}[/] ({job.spec.name}): {job.state}")
        if follow:
            _watch(client, job.id, as_json)


@jobs_app.command()
def plan(
    spec_file: SpecArgument,
    assignments: Annotated[list[str], typer.Option("--set", help="Change one field, as for submit.")] = [],  # noqa: B006
    as_json: JsonOption = False,
) -> None:
    """Show what a job would be, without submitting it; exit status 1 if the cluster could not hold it."""
    with open_client() as client:
        planned = client.plan(read_spec(spec_file, assignments))
    if as_json:
        _print_json(planned)
    else:
        Console().print(display.plan_panel(planned))
    if not planned.feasible:
        raise typer.Exit(1)


@jobs_app.command("list")
def list_jobs(
    state: Annotated[list[JobState], typer.Option(help="Only jobs in this state; may be repeated.")] = [],  # noqa: B006
    limit: Annotated[int, typer.Option(min=1, max=200)] = 20,
    as_json: JsonOption = False,
) -> None:
    """List jobs, newest first."""
    with open_client() as client:
        page = client.jobs(states=state or None, limit=limit)
    if as_json:
        _print_json(page)
    else:
        Console().print(display.job_table(page.items))


@jobs_app.command()
def show(
    job: JobArgument,
    report: Annotated[bool, typer.Option("--report", help="Show the convergence and drift report.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show where a job stands, or its report."""
    with open_client() as client:
        answer = client.report(job) if report else client.job(job)
    if as_json:
        _print_json(answer)
    else:
        Console().print(display.report_panel(answer) if report else display.job_panel(answer))  # type: ignore[arg-type]


@jobs_app.command()
def watch(job: JobArgument, as_json: JsonOption = False) -> None:
    """Follow a job until it ends; the exit status is 0 only if it succeeded."""
    with open_client() as client:
        _watch(client, job, as_json)


@jobs_app.command()
def logs(
    job: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", help="Stay and print new lines until the job ends.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print what a job's workers and runner have logged."""
    with open_client() as client:
        for record in client.follow_logs(job) if follow else _written_so_far(client, job):
            typer.echo(record.model_dump_json() if as_json else display.log_line(record))


def _written_so_far(client: Client, job_id: str) -> Iterator[LogRecord]:
    after = 0
    while records := client.logs(job_id, after=after):
        after = records[-1].seq
        yield from records


def _watch(client: Client, job_id: str, as_json: bool) -> None:
    if as_json:
        for kind, payload in client.stream(job_id):
            typer.echo(json.dumps({"type": kind, **payload}))
    else:
        display.watch(Console(), client, job_id)
    if client.job(job_id).state is not JobState.SUCCEEDED:
        raise typer.Exit(1)


def _print_json(answer: BaseModel) -> None:
    typer.echo(answer.model_dump_json())
