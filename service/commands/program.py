"""The whole of the command line: every family of commands under one name, and how an error ends it."""

import json
import sys

import typer
from rich.console import Console

from service import display
from service.commands.jobs import jobs_app
from service.commands.keys import keys_app
from service.commands.maintenance import maintenance_app
from service.commands.reports import reports_app
from service.commands.running import running_app
from service.commands.steering import steering_app
from service.commands.webhooks import webhooks_app
from service.errors import ServiceError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train BatchNorm networks on many workers as if they were one. SYNCBN_URL names the service to talk to.",
)
app.add_typer(running_app)
app.add_typer(jobs_app)
app.add_typer(reports_app)
app.add_typer(steering_app)
app.add_typer(keys_app, name="keys")
app.add_typer(webhooks_app, name="webhooks")
app.add_typer(maintenance_app)


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
