"""The command line: ``syncbn serve`` runs the service, every other command talks to one over REST."""

import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console

from service import display
from service.client import Client
from service.connection import checked, open_client
from service.errors import FieldProblem, InvalidRequest, ServiceError
from service.jobs import JobSpec, JobState, LogRecord
from service.keys_cli import keys_app
from service.log import configure_log
from service.maintenance import maintenance_app
from service.options import JobArgument, JsonOption, SpecArgument
from service.settings import ClientSettings, Settings
from service.steering_cli import steering_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train BatchNorm networks on many workers as if they were one. SYNCBN_URL names the service to talk to.",
)
app.add_typer(keys_app, name="keys")
app.add_typer(maintenance_app)
app.add_typer(steering_app)


def main() -> None:
    """Run the command line; an error of the service is one line on stderr and exit status 1."""
    try:
        app()
    except ServiceError as error:
        if "--json" in sys.argv:
            problems = [vars(p) for p in getattr(error, "problems", ())]
            print(json.dumps({"code": error.code, "detail": str(error), "errors": problems}), file=sys.stderr)  # noqa: T201
        else:
            display.print_error(Console(stderr=True), error)
        sys.exit(1)


@app.command()
def serve(
    data_dir: Annotated[Path | None, typer.Option(help="Database, checkpoints, lock. [SYNCBN_DATA_DIR]")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [SYNCBN_HOST]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on, 0 for any free one. [SYNCBN_PORT]")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run the service until Ctrl-C, with a local Ray head unless SYNCBN_RAY_ADDRESS names a cluster."""
    from service.composition import serve as run_service  # imports the web and cluster parts, needed here alone

    chosen = {"data_dir": data_dir, "host": host, "port": port}
    settings = checked(lambda: Settings(**{name: value for name, value in chosen.items() if value is not None}))  # type: ignore[arg-type]
    configure_log(as_json=as_json)
    run_service(settings, lambda url: _announce(url, settings, as_json))


@app.command()
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
    spec = _read_spec(spec_file, assignments)
    with open_client() as client:
        job = client.submit(spec, idempotency_key=idempotency_key)
        if as_json:
            _print_json(job)
        else:
            Console().print(f"submitted [bold]{job.id}[/] ({job.spec.name}): {job.state}")
        if follow:
            _watch(client, job.id, as_json)


@app.command()
def plan(
    spec_file: SpecArgument,
    assignments: Annotated[list[str], typer.Option("--set", help="Change one field, as for submit.")] = [],  # noqa: B006
    as_json: JsonOption = False,
) -> None:
    """Show what a job would be, without submitting it; exit status 1 if the cluster could not hold it."""
    with open_client() as client:
        planned = client.plan(_read_spec(spec_file, assignments))
    if as_json:
        _print_json(planned)
    else:
        Console().print(display.plan_panel(planned))
    if not planned.feasible:
        raise typer.Exit(1)


@app.command("list")
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


@app.command()
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


@app.command()
def watch(job: JobArgument, as_json: JsonOption = False) -> None:
    """Follow a job until it ends; the exit status is 0 only if it succeeded."""
    with open_client() as client:
        _watch(client, job, as_json)


@app.command()
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


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Look for what most often goes wrong on a machine and say the remedy; exit status 1 if anything is."""
    from service.doctor import examine  # imports torch and ray to see whether they can be

    findings = examine(checked(Settings), checked(ClientSettings))
    if as_json:
        typer.echo(json.dumps([finding.model_dump() for finding in findings]))
    else:
        Console().print(display.findings_table(findings))
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def _watch(client: Client, job_id: str, as_json: bool) -> None:
    if as_json:
        for kind, payload in client.stream(job_id):
            typer.echo(json.dumps({"type": kind, **payload}))
    else:
        display.watch(Console(), client, job_id)
    if client.job(job_id).state is not JobState.SUCCEEDED:
        raise typer.Exit(1)


def _read_spec(path: Path, assignments: list[str]) -> JobSpec:
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text()
        fields = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InvalidRequest([FieldProblem("", "unreadable", f"cannot read {path}: {error}")]) from None
    if not isinstance(fields, dict):
        raise InvalidRequest([FieldProblem("", "not_an_object", f"{path} must hold one object of fields")])
    for assignment in assignments:
        _assign(fields, assignment)
    return checked(lambda: JobSpec.model_validate(fields))


def _assign(fields: dict[str, Any], assignment: str) -> None:
    name, equals, text = assignment.partition("=")
    if not equals or not name:
        raise InvalidRequest([FieldProblem("", "bad_assignment", f"--set {assignment}: write it as field=value")])
    *parents, last = name.split(".")
    for parent in parents:
        fields = fields.setdefault(parent, {})
    try:
        fields[last] = json.loads(text)
    except ValueError:
        fields[last] = text


def _announce(url: str, settings: Settings, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"url": url, "data_dir": str(settings.data_dir)}))
    else:
        typer.echo(f"syncbn is listening on {url} (data in {settings.data_dir}); Ctrl-C stops it")
    sys.stdout.flush()


def _print_json(answer: BaseModel) -> None:
    typer.echo(answer.model_dump_json())


if __name__ == "__main__":
    main()
