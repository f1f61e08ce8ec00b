"""A database on a PostgreSQL server, for any number of services. All that is special to PostgreSQL is here.

Writers work beside each other in READ COMMITTED and lock what they read, in one order everywhere (`Database.write`), so
none fails only because another was there first. Readers see one snapshot, as they do on SQLite.
"""

import importlib.util

from pydantic import SecretStr
from sqlalchemy import URL, Engine, create_engine, make_url, text
from sqlalchemy.exc import ArgumentError

from service.errors import StoreUnavailable
from service.store.engine import Database, answering
from service.store.locks import lock_name
from service.store.upgrade import bring_up_to_date, is_up_to_date

MAX_CONNECTIONS = 32
"""Of one service, at once; the server allows 100 by default."""

_CONNECT_TIMEOUT_S = 5
_STATEMENT_TIMEOUT_S = 30.0
_FORGOTTEN_TRANSACTION_S = 60.0
_UPGRADE_TIMEOUT_S = 60.0
"""How long an upgrade waits for another service that is upgrading, or for a table that is in use."""

REMEDY = "is it running, reachable, not full, and SYNCBN_DATABASE_URL right?"
_KEEPALIVE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 15_000}
"""A server that vanished without a word is noticed within half a minute."""


def open_postgresql(url: SecretStr, busy_timeout_s: float) -> Database:
    """The database that ``url`` names, with its tables made or upgraded if need be.

    Of several services that start at once one upgrades, and the others wait for it. A lock is waited for at most
    ``busy_timeout_s``. No message ever holds the URL, because the password may stand in it.

    Raises: StoreUnavailable where the server cannot be used, or a newer service has written the database.
    """
    engine, name = reach_postgresql(url, busy_timeout_s)
    # Asked for by name: the server may have been set to another default.
    writer = engine.execution_options(isolation_level="READ COMMITTED")
    reader = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    database = Database(reader, writer, name, remedy=REMEDY)
    try:
        with answering(name, REMEDY):
            _check_encoding(writer, name)
        with database.read() as connection:
            up_to_date = is_up_to_date(connection)
        if not up_to_date:
            with answering(name, REMEDY):
                _upgrade(writer, name)
    except BaseException:
        database.close()
        raise
    return database


def reach_postgresql(url: SecretStr, busy_timeout_s: float) -> tuple[Engine, str]:
    """What connects to the database that ``url`` names when it is used, and how errors may call it.

    Raises: StoreUnavailable where ``url`` is none of PostgreSQL, or its driver is missing.
    """
    if importlib.util.find_spec("psycopg") is None:
        raise StoreUnavailable("PostgreSQL needs the package psycopg; install syncbn with the extra postgresql")
    address = _parse(url)
    name = f"database {address.database or address.username} on {address.host or 'the local PostgreSQL socket'}"
    return _engine(address, busy_timeout_s), name


def _parse(url: SecretStr) -> URL:
    try:
        address = make_url(url.get_secret_value())
    except (ArgumentError, ValueError):
        address = None  # not even as the cause of our error may the URL be told
    if address is None or address.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise StoreUnavailable(
            "SYNCBN_DATABASE_URL is no address of PostgreSQL; it reads postgresql://USER:PASSWORD@HOST:PORT/DATABASE, "
            "with special characters of the password written as %XX"
        )
    return address.set(drivername="postgresql+psycopg")


def _engine(address: URL, busy_timeout_s: float) -> Engine:
    timeouts = {
        "statement_timeout": _STATEMENT_TIMEOUT_S,
        "lock_timeout": busy_timeout_s,
        "idle_in_transaction_session_timeout": _FORGOTTEN_TRANSACTION_S,
    }
    options = " ".join(f"-c {option}={int(seconds * 1000)}" for option, seconds in timeouts.items())
    # Whatever the server's default is: what was answered shall survive a power cut.
    options += " -c synchronous_commit=on"
    chosen = address.query.get("options", "")
    defaults = {"connect_timeout": _CONNECT_TIMEOUT_S, "application_name": "syncbn", **_KEEPALIVE}
    # Of servers that are named together only the one that takes writes will do.
    defaults["target_session_attrs"] = "read-write"
    connect_args = {key: value for key, value in defaults.items() if key not in address.query}
    connect_args["options"] = f"{options} {chosen if isinstance(chosen, str) else ' '.join(chosen)}".strip()
    return create_engine(
        address,
        connect_args=connect_args,
        pool_size=8,
        max_overflow=MAX_CONNECTIONS - 8,
        pool_timeout=busy_timeout_s,
        # A connection that a restarted server has forgotten is replaced before it is used.
        pool_pre_ping=True,
    )


def _check_encoding(engine: Engine, name: str) -> None:
    with engine.connect() as connection:
        encoding = connection.execute(text("SHOW server_encoding")).scalar_one()
    if encoding != "UTF8":
        raise StoreUnavailable(f"{name} keeps text as {encoding}; make it with CREATE DATABASE ... ENCODING 'UTF8'")


def _upgrade(engine: Engine, name: str) -> None:
    with engine.connect() as connection, connection.begin():
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text(f"SET LOCAL lock_timeout = {int(_UPGRADE_TIMEOUT_S * 1000)}"))
        lock_name(connection, "schema")
        bring_up_to_date(connection, name, "SYNCBN_DATABASE_URL")
