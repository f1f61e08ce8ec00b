"""The commands that care for the database, as an operator types them on the service's machine."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service.commands.program import app
from service.errors import Gone, ServiceError
from service.jobs import JobState, attempt_id, new_job_id
from service.lock import DataFolderInUse, lock_data_folder
from service.store import JobStore
from tests.service.store.telling import batch, spec, started, step

LONG_AGO = time.time() - 10 * 86_400


def syncbn(folder: Path, *arguments: str, **environment: str) -> Any:
    """The JSON that a command answers. Raises what the command raises."""
    told = CliRunner().invoke(app, [*arguments, "--data-dir", str(folder), "--json"], env=environment)
    if told.exception is not None and not isinstance(told.exception, SystemExit):
        raise told.exception
    assert told.exit_code == 0, told.output
    return json.loads(told.output)


def _ended_job(folder: Path) -> str:
    store = JobStore.open(folder / "syncbn.sqlite")
    job, token = store.start_attempt(store.create(spec())[0])
    store.ingest(attempt_id(job.id, 1), token, batch([started(), step(1)]))
    store.transition(store.transition(job, JobState.RUNNING), JobState.SUCCEEDED)
    store.close()
    return job.id


def test_a_backup_comes_back_unless_a_service_holds_the_folder(tmp_path: Path) -> None:
    folder, file = tmp_path / "data", tmp_path / "copy.sqlite"
    _ended_job(folder)
    with lock_data_folder(folder):
        made = syncbn(folder, "backup", str(file))
        _ended_job(folder)
        with pytest.raises(DataFolderInUse, match=f"process id {os.getpid()}"):
            syncbn(folder, "restore", str(file))
    assert made == {"file": str(file), "num_jobs": 1, "size_bytes": file.stat().st_size}
    done = syncbn(folder, "restore", str(file))
    assert (done["num_jobs"], done["database"]) == (1, str(folder / "syncbn.sqlite"))
    kept = JobStore.open(Path(done["kept"]))
    assert len(kept.list_jobs().items) == 2
    kept.close()


def test_what_has_been_kept_long_enough_is_forgotten_and_its_room_given_back(tmp_path: Path) -> None:
    job_id = _ended_job(tmp_path)
    nothing = {"metrics": 0, "logs": 0, "events": 0}
    assert syncbn(tmp_path, "gc", "--metrics-days", "1") == {
        "kept_days": {"metrics": 1, "logs": None, "events": None, "audit": 365},
        "forgotten": nothing,
        "audit_entries": 0,
        "removed": [],
        "freed_bytes": 0,
    }
    told = syncbn(tmp_path, "gc", "--metrics-days", "0", "--compact")
    assert told["forgotten"] == nothing | {"metrics": 1}
    assert told["freed_bytes"] >= 0
    store = JobStore.open(tmp_path / "syncbn.sqlite")
    with pytest.raises(Gone):
        store.metric_names(job_id)
    store.close()
    said = syncbn(tmp_path, "gc", SYNCBN_KEEP_EVENTS_DAYS="7", SYNCBN_KEEP_AUDIT_DAYS="forever")["kept_days"]
    assert said == {"metrics": None, "logs": None, "events": 7, "audit": None}
    with lock_data_folder(tmp_path), pytest.raises(DataFolderInUse):
        syncbn(tmp_path, "gc", "--compact", "--logs-days", "0")
    store = JobStore.open(tmp_path / "syncbn.sqlite")
    assert store.logs(job_id) == []
    store.close()


def test_storage_of_unknown_jobs_goes_only_when_asked_and_only_if_it_is_old(tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    known = storage / _ended_job(tmp_path)
    unknown, fresh, foreign = storage / new_job_id(), storage / new_job_id(), storage / "mine"
    for folder in (known, unknown, fresh, foreign):
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "a").touch()
        if folder != fresh:
            for path in (folder / "checkpoints" / "a", folder / "checkpoints", folder):
                os.utime(path, (LONG_AGO, LONG_AGO))
    (storage / new_job_id()).symlink_to(foreign)
    before = set(storage.iterdir())
    assert syncbn(tmp_path, "gc")["removed"] == []
    assert set(storage.iterdir()) == before
    assert syncbn(tmp_path, "gc", "--orphaned-storage")["removed"] == [str(unknown)]
    assert set(storage.iterdir()) == before - {unknown}


@pytest.mark.parametrize(
    ("command", "tool"),
    [(("backup", "x"), "pg_dump"), (("restore", "x"), "pg_restore")],
)
def test_postgresql_has_tools_of_its_own(tmp_path: Path, command: tuple[str, ...], tool: str) -> None:
    with pytest.raises(ServiceError, match=f"whose own tool for this is {tool}"):
        syncbn(tmp_path, *command, SYNCBN_DATABASE_URL="postgresql://u:secret@h/d")


def test_a_folder_without_a_database_is_not_given_one(tmp_path: Path) -> None:
    for command in (("backup", str(tmp_path / "x")), ("gc",)):
        with pytest.raises(ServiceError, match="name the service's folder with --data-dir"):
            syncbn(tmp_path / "data", *command)
    assert list(tmp_path.iterdir()) == []
