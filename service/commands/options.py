"""Options and arguments that several commands of the command line share: one wording for each."""

from pathlib import Path
from typing import Annotated

import typer

DataDir = Annotated[Path | None, typer.Option(help="The service's data folder. [SYNCBN_DATA_DIR]")]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="A job id, as `syncbn list` shows it.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text for people.")]
SpecArgument = Annotated[Path, typer.Argument(metavar="SPEC", help="A .json or .toml file, or - for JSON on stdin.")]
