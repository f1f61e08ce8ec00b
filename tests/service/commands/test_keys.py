"""``syncbn keys`` as an operator runs it, beside a service that may be up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from service.commands.keys import keys_app
from service.errors import InvalidRequest, NotFound, Unauthorized
from service.jobs import Role
from service.settings import Settings
from service.store import JobStore


def keys(data_dir: Path, *arguments: str) -> Result:
    environment = {"SYNCBN_DATA_DIR": str(data_dir), "SYNCBN_DATABASE_URL": None, "COLUMNS": "200"}
    return CliRunner().invoke(keys_app, arguments, env=environment)


def test_the_first_key_is_made_replaced_and_revoked_on_the_machine_itself(tmp_path: Path) -> None:
    made = keys(tmp_path, "create", "--principal", "alice", "--role", "admin")
    assert made.exit_code == 0, made.stderr
    first = made.stdout.strip()
    store = JobStore.open(Settings(data_dir=tmp_path).database_path)
    caller = store.keys.identify(first)
    assert (caller.principal.name, caller.principal.role) == ("alice", Role.ADMIN)
    assert caller.key is not None
    assert caller.key.id in made.stderr
    second = json.loads(keys(tmp_path, "rotate", caller.key.id, "--json").stdout)
    assert store.keys.identify(second["key"]).principal == caller.principal
    with pytest.raises(Unauthorized, match="revoked"):
        store.keys.identify(first)
    assert keys(tmp_path, "revoke", second["id"]).exit_code == 0
    listed = keys(tmp_path, "list").stdout
    assert caller.key.id in listed
    assert listed.count("revoked") == 2
    trail = [(r.address, r.action, r.target) for r in store.audit.page().items]
    assert trail == [
        ("local", "keys revoke", f"/v1/api-keys/{second['id']}"),
        ("local", "keys rotate", f"/v1/api-keys/{second['id']}"),
        ("local", "keys create", f"/v1/api-keys/{caller.key.id}"),
    ]
    store.close()


def test_what_cannot_be_done_says_why(tmp_path: Path) -> None:
    for arguments, reason in (
        (["create", "--principal", "Nobody"], "small letters"),
        (["create", "--principal", "nobody"], "there is no principal nobody"),
        (["revoke", "key_none"], "there is no key key_none"),
    ):
        answer = keys(tmp_path, *arguments)
        assert (answer.exit_code, answer.stdout) == (1, "")
        assert isinstance(answer.exception, InvalidRequest | NotFound)
        assert reason in str(answer.exception)


def test_the_command_is_one_of_syncbns(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "SYNCBN_DATA_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "service", "keys", "revoke", "key_none"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (answer.returncode, answer.stdout, answer.stderr) == (1, "", "error: there is no key key_none\n")
