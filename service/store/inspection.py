"""A look at a database without touching it: not even the tables that it lacks are made."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import SecretStr
from sqlalchemy import Connection, Engine, create_engine, func, inspect, select
from sqlalchemy.pool import NullPool

from service.store.engine import answering
from service.store.postgresql import REMEDY, reach_postgresql
from service.store.schema import api_keys, jobs
from service.store.upgrade import SchemaAge, schema_age

_BUSY_S = 5.0


@dataclass(frozen=True)
class Inspection:
    """What was seen."""

    age: SchemaAge
    keys_made: bool
    """Whether an API key was ever made in it."""
    newest_at: datetime | None
    """When a job last changed, by the clock of the service that wrote it."""
    server_time: datetime | None
    """What the server's own clock says now; SQLite has none."""


def inspect_sqlite(path: Path) -> Inspection:
    """The file ``path``, which may be missing. Raises: StoreUnavailable where it cannot be read as a database."""
    if not path.exists():
        return Inspection(SchemaAge.EMPTY, keys_made=False, newest_at=None, server_time=None)
    address = f"sqlite:///{path.absolute().as_uri()}?mode=ro&uri=true"
    engine = create_engine(address, poolclass=NullPool, connect_args={"timeout": _BUSY_S})
    return _look(engine, str(path), "is it a database, and readable?")


def inspect_postgresql(url: SecretStr) -> Inspection:
    """The database that ``url`` names. Raises: StoreUnavailable."""
    engine, name = reach_postgresql(url, _BUSY_S)
    return _look(engine, name, REMEDY)


def _look(engine: Engine, name: str, remedy: str) -> Inspection:
    try:
        with answering(name, remedy), engine.connect() as connection:
            return _inspect(connection)
    finally:
        engine.dispose()


def _inspect(connection: Connection) -> Inspection:
    has_table = inspect(connection).has_table
    has_server = connection.dialect.name == "postgresql"
    newest = select(func.max(jobs.c.updated_at))
    return Inspection(
        age=schema_age(connection),
        keys_made=has_table(api_keys.name) and connection.execute(select(api_keys.c.id).limit(1)).first() is not None,
        newest_at=connection.execute(newest).scalar() if has_table(jobs.name) else None,
        server_time=connection.execute(select(func.clock_timestamp())).scalar_one() if has_server else None,
    )
