"""How writers that work at the same time wait for each other; on SQLite there is only one, and nothing to wait for."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Table, func, select
from sqlalchemy.dialects import postgresql, sqlite


def lock_name(connection: Connection, *name: str) -> None:
    """Hold a name until the transaction ends, whether or not there is a row of that name yet."""
    if connection.dialect.name == "postgresql":
        key = func.hashtextextended("\x1f".join(name), 0)
        connection.execute(select(func.pg_advisory_xact_lock(key)))


def insert_if_absent(connection: Connection, table: Table, row: Mapping[str, Any]) -> bool:
    """Insert the row if none has its key, waiting for another writer that is just inserting one; whether it was."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    return connection.execute(insert(table).values(row).on_conflict_do_nothing()).rowcount == 1
