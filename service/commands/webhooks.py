"""``syncbn webhooks``: where the service tells of jobs' events by itself, over REST."""

from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from service.client import Client
from service.commands.connection import checked, open_client
from service.commands.options import JsonOption
from service.jobs import Topic, Webhook, WebhookDelivery, WebhookOrder

webhooks_app = typer.Typer(no_args_is_help=True, help="Have the service tell of jobs' events by itself.")

HookArgument = Annotated[
    str, typer.Argument(metavar="HOOK", help="A webhook's id, as `syncbn webhooks list` shows it.")
]

_PAGE = 200


@webhooks_app.command()
def add(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where events are posted to.")],
    secret: Annotated[
        str, typer.Option(help="Name of the secret that lies with the service, as ci@alice; never the secret itself.")
    ],
    event: Annotated[
        list[Topic], typer.Option(help="Also of this type; may be repeated. Changes of state are always told.")
    ] = [Topic.STATE_CHANGED],  # noqa: B006 - typer copies it
    everyones: Annotated[
        bool, typer.Option("--all", help="Everyone's jobs, as an admin may; else the own ones.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Have every event of the own jobs, of these types, posted to a URL from now on, signed."""
    wanted = {"url": url, "events": event, "secret": secret, "all": everyones}
    order = checked(lambda: WebhookOrder.model_validate(wanted))
    with open_client() as client:
        hook = client.make_webhook(order)
    _tell(
        hook, as_json, f"{hook.id} tells {hook.url} of {', '.join(hook.events)}; try it: syncbn webhooks test {hook.id}"
    )


@webhooks_app.command("list")
def list_webhooks(as_json: JsonOption = False) -> None:
    """List webhooks, oldest first; everyone's for an admin, else the own ones."""
    with open_client() as client:
        hooks = list(_all_webhooks(client))
    if as_json:
        for hook in hooks:
            typer.echo(hook.model_dump_json())
        return
    table = Table(Column("webhook", no_wrap=True), "owner", "state", "url", "events", box=None)
    for hook in hooks:
        owner = f"{hook.owner} (everyone's)" if hook.all else hook.owner
        table.add_row(hook.id, owner, hook.state, escape(hook.url), ", ".join(hook.events))
    Console().print(table)


@webhooks_app.command()
def show(hook: HookArgument, as_json: JsonOption = False) -> None:
    """Show a webhook and what came of the last tries to tell it something; with --json one line each."""
    with open_client() as client:
        shown, tries = client.webhook(hook), client.deliveries(hook)
    if as_json:
        for part in (shown, *tries):
            typer.echo(part.model_dump_json())
        return
    console = Console()
    about = f"{shown.id} of {shown.owner} is {shown.state}: {shown.url}, signed with {shown.secret}"
    console.print(about, soft_wrap=True, highlight=False, markup=False)
    table = Table("time", "event", Column("job", no_wrap=True), "came of it", "seconds", box=None)
    for one in tries:
        table.add_row(
            f"{one.time:%m-%d %H:%M:%S}", one.event, one.job_id or "", escape(_result(one)), f"{one.duration_s:.2f}"
        )
    console.print(table)


@webhooks_app.command("test")
def try_webhook(hook: HookArgument, as_json: JsonOption = False) -> None:
    """Send a message of type test now; exit status 1 if it is not delivered. Success wakes a failing webhook."""
    with open_client() as client:
        tried = client.try_webhook(hook)
    _tell(tried, as_json, f"{hook} {_result(tried)}, in {tried.duration_s:.2f} s")
    if tried.error is not None:
        raise typer.Exit(1)


@webhooks_app.command()
def remove(hook: HookArgument) -> None:
    """Tell it nothing any more, not even what waits."""
    with open_client() as client:
        client.remove_webhook(hook)
    typer.echo(f"{hook} is removed")


def _all_webhooks(client: Client) -> Iterator[Webhook]:
    after = ""
    while page := client.webhooks(_PAGE, after):
        yield from page
        after = page[-1].id


def _result(tried: WebhookDelivery) -> str:
    return f"answered {tried.status}" if tried.error is None else f"failed: {tried.error}"


def _tell(answer: Webhook | WebhookDelivery, as_json: bool, text: str) -> None:
    typer.echo(answer.model_dump_json() if as_json else text)
