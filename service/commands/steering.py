"""``syncbn cancel``, ``pause``, ``resume``, ``checkpoint``, ``retry`` and ``priority``: steering a job over REST."""

from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console

from service.client import Client
from service.commands.connection import open_client
from service.commands.options import JobArgument, JsonOption
from service.errors import FieldProblem, InvalidRequest
from service.jobs import Job

steering_app = typer.Typer()


@steering_app.command()
def cancel(
    job: JobArgument,
    checkpoint: Annotated[bool, typer.Option("--checkpoint", help="Let it save a checkpoint first.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Cancel a job; cancelling it again changes nothing."""
    _steer(lambda client: client.cancel(job, checkpoint), as_json)


@steering_app.command()
def pause(job: JobArgument, as_json: JsonOption = False) -> None:
    """Let a job save a checkpoint and give its resources back, until it is resumed."""
    _steer(lambda client: client.pause(job), as_json)


@steering_app.command()
def resume(
    job: JobArgument,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Go on with so many workers, which share the same images a step.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Put a paused job back into the queue; it goes on from its checkpoint."""
    _steer(lambda client: client.resume(job, workers), as_json)


@steering_app.command()
def checkpoint(job: JobArgument, as_json: JsonOption = False) -> None:
    """Ask a job that runs to save a checkpoint now."""
    _steer(lambda client: client.checkpoint(job), as_json, "is asked for a checkpoint and")


@steering_app.command()
def retry(
    job: JobArgument,
    from_step: Annotated[int | None, typer.Option(min=0, help="Begin from the checkpoint of this step.")] = None,
    from_start: Annotated[bool, typer.Option("--from-start", help="Begin from the beginning.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Take up a job that is over as a new one, from its newest checkpoint where it did not succeed."""
    if from_start and from_step is not None:
        raise InvalidRequest([FieldProblem("", "contradiction", "give --from-step or --from-start, not both")])
    wanted = False if from_start else from_step
    _steer(lambda client: client.retry(job, wanted), as_json, f"takes up {job} and")


@steering_app.command(context_settings={"ignore_unknown_options": True})
def priority(
    job: JobArgument,
    number: Annotated[int, typer.Argument(metavar="N", min=-100, max=100, help="Greater goes first.")],
    as_json: JsonOption = False,
) -> None:
    """Put a waiting job before or behind the other jobs of its owner."""
    _steer(lambda client: client.set_priority(job, number), as_json, f"has priority {number} and")


def _steer(act: Callable[[Client], Job], as_json: bool, said: str = "") -> None:
    with open_client() as client:
        job = act(client)
    if as_json:
        typer.echo(job.model_dump_json())
    else:
        Console().print(" ".join(filter(None, (job.id, said, f"is {job.state}"))), soft_wrap=True, highlight=False)
