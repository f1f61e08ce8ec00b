"""``syncbn keys``: API keys straight in the database, on the service's own machine and with its settings.

Whoever can open the database could write into it anyway, so no key is asked for; this is how the first one is made.
The service may be running meanwhile.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from service.commands.options import DataDir, JsonOption
from service.errors import FieldProblem, InvalidRequest
from service.jobs import ApiKey, AuditEntry, KeyOrder, NewApiKey, PrincipalTerms, Role
from service.settings import Settings

if TYPE_CHECKING:
    from service.store import JobStore

keys_app = typer.Typer(no_args_is_help=True, help="Make, list, replace and revoke API keys on the service's machine.")

KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="A key's id, as `syncbn keys list` shows it.")]
PrincipalOption = Annotated[str, typer.Option(help="Whose key it is.")]

_PAGE = 200


@keys_app.command()
def create(
    principal: PrincipalOption,
    role: Annotated[Role | None, typer.Option(help="Make the principal, or change its role, to this one.")] = None,
    expires_in_days: Annotated[float | None, typer.Option(min=0.001, max=3660)] = None,
    data_dir: DataDir = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print it, once."""
    expires_in_s = None if expires_in_days is None else expires_in_days * 86400
    order = _checked_order(principal, expires_in_s)
    with _store(data_dir) as store:
        if role is not None:
            store.principals.put(principal, PrincipalTerms(role=role, quota=store.principals.quota_of(principal)))
        made = store.keys.make(principal, None if expires_in_s is None else timedelta(seconds=expires_in_s))
        told = order.model_dump_json(exclude_none=True) + ("" if role is None else f" as {role}")
        _put_on_record(store, "keys create", made.id, told, 201)
    _tell_new(made, as_json)


@keys_app.command("list")
def list_keys(
    principal: Annotated[str | None, typer.Option(help="Only this principal's keys.")] = None,
    data_dir: DataDir = None,
    as_json: JsonOption = False,
) -> None:
    """List keys, ended ones too; the keys themselves are not kept."""
    with _store(data_dir) as store:
        found = list(_all_keys(store, principal))
    if as_json:
        for key in found:
            typer.echo(key.model_dump_json())
        return
    table = Table(Column("key", no_wrap=True, min_width=30), "principal", "made", "last used", "ends")
    for key in found:
        ends = "revoked" if key.revoked_at else _day(key.expires_at, "never")
        table.add_row(key.id, key.principal, _day(key.created_at), _day(key.last_used_at, "never"), ends)
    Console().print(table)


@keys_app.command()
def revoke(key: KeyArgument, data_dir: DataDir = None, as_json: JsonOption = False) -> None:
    """Let a key open nothing from now on."""
    with _store(data_dir) as store:
        revoked = store.keys.revoke(key)
        _put_on_record(store, "keys revoke", key, "", 200)
    typer.echo(revoked.model_dump_json() if as_json else f"{key} of {revoked.principal} is revoked")


@keys_app.command()
def rotate(
    key: KeyArgument,
    grace_hours: Annotated[float, typer.Option(min=0, max=720, help="How long the old key stays good.")] = 0,
    data_dir: DataDir = None,
    as_json: JsonOption = False,
) -> None:
    """Make a new key in a key's place and print it, once."""
    with _store(data_dir) as store:
        made = store.keys.rotate(key, timedelta(hours=grace_hours))
        _put_on_record(store, "keys rotate", made.id, f"replaces {key}", 201)
    _tell_new(made, as_json)


@contextmanager
def _store(data_dir: Path | None) -> "Iterator[JobStore]":
    from service.memory import open_store  # imports the SQL part, needed here alone

    settings = Settings() if data_dir is None else Settings(data_dir=data_dir)
    store = open_store(settings)
    try:
        yield store
    finally:
        store.close()


def _checked_order(principal: str, expires_in_s: float | None) -> KeyOrder:
    try:
        return KeyOrder(principal=principal, expires_in_s=expires_in_s)
    except ValueError:
        text = "a name has 1 to 64 small letters, digits and . _ -, and begins with a letter or digit"
        raise InvalidRequest([FieldProblem("/principal", "principal_invalid", text)]) from None


def _all_keys(store: "JobStore", principal: str | None) -> Iterator[ApiKey]:
    after = ""
    while page := store.keys.page(_PAGE, after, principal):
        yield from page
        after = page[-1].id


def _put_on_record(store: "JobStore", command: str, key_id: str, detail: str, status: int) -> None:
    entry = AuditEntry(
        address="local",
        action=command,
        target=f"/v1/api-keys/{key_id}",
        detail=detail,
        status=status,
        request_id=secrets.token_hex(8),
    )
    store.audit.append(entry)


def _tell_new(made: NewApiKey, as_json: bool) -> None:
    if as_json:
        typer.echo(made.model_dump_json())
    else:
        typer.echo(f"{made.id} of {made.principal}; this is told once and kept nowhere:", err=True)
        typer.echo(made.key)


def _day(time: object, otherwise: str = "") -> str:
    return otherwise if time is None else f"{time:%Y-%m-%d %H:%M}"
