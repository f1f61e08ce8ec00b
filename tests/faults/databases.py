"""Where each process that is killed has its database: a file of its own, or a database of its own on a server."""

import shutil
from pathlib import Path
from typing import Protocol

import psycopg
from pydantic import SecretStr
from sqlalchemy import make_url

from service.store import JobStore

_FILE = "jobs.sqlite"
_EMPTY = "empty"


class Databases(Protocol):
    """Alike databases with nothing but their tables, one for each folder."""

    def prepare(self, folder: Path) -> None:
        """Make the one that the others are copies of. Nothing stays open, so that the process may fork."""

    def add(self, own: Path) -> None:
        """Make the one of the folder ``own``, which lies in the folder that was prepared."""

    def open(self, own: Path) -> JobStore: ...


class Files:
    """SQLite."""

    def prepare(self, folder: Path) -> None:
        JobStore.open(folder / _FILE).close()

    def add(self, own: Path) -> None:
        shutil.copy(own.parent / _FILE, own)

    def open(self, own: Path) -> JobStore:
        return JobStore.open(own / _FILE)


class OnServer:
    """PostgreSQL: ``url`` is that of the server's database ``postgres``, from where the others are made."""

    def __init__(self, url: str) -> None:
        self._url = url

    def prepare(self, folder: Path) -> None:
        self._make(_EMPTY, "template0")
        JobStore.connect(self._url_of(_EMPTY)).close()

    def add(self, own: Path) -> None:
        self._make(_name_of(own), _EMPTY)

    def open(self, own: Path) -> JobStore:
        return JobStore.connect(self._url_of(_name_of(own)))

    def _make(self, name: str, template: str) -> None:
        with psycopg.connect(self._url, autocommit=True, connect_timeout=5) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy".encode())

    def _url_of(self, name: str) -> SecretStr:
        return SecretStr(make_url(self._url).set(database=name).render_as_string(hide_password=False))


def _name_of(own: Path) -> str:
    return f"crash_{own.name}"
