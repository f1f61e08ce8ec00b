"""From whatever schema a database has to the one that this code knows, and never back."""

from enum import StrEnum
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, insert, inspect, select
from sqlalchemy.exc import DBAPIError

from service.errors import StoreUnavailable
from service.store.schema import SCHEMA_VERSION, metadata, schema_version

BASELINE = "0001_baseline"
"""What databases have that were made before there were migrations."""


def migrations(connection: Connection | None = None) -> Config:
    """What Alembic's commands need to know; they work inside the transaction of ``connection``."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


class SchemaAge(StrEnum):
    """How a database's tables stand to this code."""

    EMPTY = "empty"
    OLDER = "older"
    CURRENT = "current"
    NEWER = "newer"


def schema_age(connection: Connection) -> SchemaAge:
    """Which of them it is; nothing is changed."""
    if is_up_to_date(connection):
        return SchemaAge.CURRENT
    current = _current(connection)
    if current is None and not inspect(connection).has_table(schema_version.name):
        return SchemaAge.EMPTY
    known = {step.revision for step in _script().walk_revisions()}
    return SchemaAge.OLDER if (current or _before_migrations(connection)) in known else SchemaAge.NEWER


def is_up_to_date(connection: Connection) -> bool:
    """Whether the database has the newest schema of this code."""
    return _current(connection) == _script().get_current_head()


def bring_up_to_date(connection: Connection, name: str, knob: str) -> None:
    """Make the tables of an empty database, or take every step that an older one lacks, in this transaction.

    Raises: StoreUnavailable, changing nothing, where a step fails, or a newer service has written the database;
        ``knob`` is the setting with which to choose another one.
    """
    current = _current(connection)
    if current is None and not inspect(connection).has_table(schema_version.name):
        metadata.create_all(connection)
        connection.execute(insert(schema_version).values(version=SCHEMA_VERSION))
        command.stamp(migrations(connection), "head")
        return
    wanted = current or _before_migrations(connection)
    if wanted not in {step.revision for step in _script().walk_revisions()}:
        raise StoreUnavailable(
            f"{name} has schema {wanted}, which this service does not know, so a newer one has written it; "
            f"run that one, or choose another {knob}"
        )
    if current is None:
        command.stamp(migrations(connection), wanted)
    try:
        command.upgrade(migrations(connection), "head")
    except DBAPIError as error:
        raise StoreUnavailable(
            f"{name} could not be brought from schema {wanted} to {_script().get_current_head()}: {error.orig}; "
            "nothing was changed"
        ) from error


def _script() -> ScriptDirectory:
    return ScriptDirectory.from_config(migrations())


def _current(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _before_migrations(connection: Connection) -> str:
    version = connection.execute(select(schema_version.c.version)).scalar()
    return BASELINE if version == 1 else f"version {version}"
