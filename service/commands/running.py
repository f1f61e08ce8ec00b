"""``syncbn serve`` and ``doctor``: running the service on this machine, and seeing what would keep it from that."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from service import display
from service.commands.connection import checked
from service.commands.options import JsonOption
from service.log import configure_log
from service.settings import ClientSettings, Settings

running_app = typer.Typer()


@running_app.command()
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


@running_app.command()
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


def _announce(url: str, settings: Settings, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"url": url, "data_dir": str(settings.data_dir)}))
    else:
        typer.echo(f"syncbn is listening on {url} (data in {settings.data_dir}); Ctrl-C stops it")
    sys.stdout.flush()
