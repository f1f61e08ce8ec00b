"""``syncbn backup``, ``restore`` and ``gc``: care for the database, on the service's own machine."""

import json
import shutil
import time
from contextlib import closing, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands.options import DataDir, JsonOption
from service.errors import ServiceError
from service.lock import lock_data_folder
from service.settings import Settings

if TYPE_CHECKING:
    from service.store import JobStore

maintenance_app = typer.Typer()

Days = Annotated[
    float | None, typer.Option(min=0, help="Forget what is older; left out, as SYNCBN_KEEP_..._DAYS says.")
]

_GRACE_S = 86_400.0
"""A storage folder in which anything changed within a day is left alone."""


class NotHere(ServiceError):
    """The command is for a database in the data folder, and there is none."""

    code = "no_such_database"
    title = "There is no database to work on"


@maintenance_app.command()
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The new file.")],
    data_dir: DataDir = None,
    as_json: JsonOption = False,
) -> None:
    """Copy the database to a new file; the service may be running."""
    from service.store.backup import back_up  # imports the SQL part, needed here alone

    made = back_up(_database_file(_settings(data_dir), "pg_dump"), file)
    told = {"file": str(made.path), "num_jobs": made.num_jobs, "size_bytes": made.size_bytes}
    _tell(told, f"{made.path}: {made.num_jobs} jobs, {_mib(made.size_bytes)}", as_json)


@maintenance_app.command()
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `syncbn backup` made.")],
    data_dir: DataDir = None,
    as_json: JsonOption = False,
) -> None:
    """Put a backup in the database's place, while no service runs; the database that was there is kept beside it.

    Jobs that ran then are looked for anew, and keys that have been revoked since are valid again.
    """
    from service.store.backup import restore as put_back

    settings = _settings(data_dir)
    database = _database_file(settings, "pg_restore", must_exist=False)
    with lock_data_folder(settings.data_dir):
        done = put_back(database, file, datetime.now(UTC))
    kept = None if done.kept is None else str(done.kept)
    text = f"{database} is now {file}, with {done.num_jobs} jobs" + (f"; before it was {kept}" if kept else "")
    _tell({"database": str(database), "num_jobs": done.num_jobs, "kept": kept}, text, as_json)


@maintenance_app.command()
def gc(
    metrics_days: Days = None,
    logs_days: Days = None,
    events_days: Days = None,
    audit_days: Days = None,
    orphaned_storage: Annotated[
        bool,
        typer.Option(
            "--orphaned-storage",
            help="Remove folders of jobs that this database does not know; not where services share storage.",
        ),
    ] = False,
    compact: Annotated[
        bool, typer.Option("--compact", help="Make the SQLite file smaller, too; only while no service runs.")
    ] = False,
    data_dir: DataDir = None,
    as_json: JsonOption = False,
) -> None:
    """Do at once what the service does by itself: forget what jobs that ended so many days ago have told.

    Whoever asks for it is told so. Of events the bodies go, and evaluations and drift with them. The audit trail loses
    what is older, and says so itself.
    """
    from service.memory import open_store, retention_of
    from service.store.backup import compact as shrink

    settings = _with_days(
        _settings(data_dir), metrics=metrics_days, logs=logs_days, events=events_days, audit=audit_days
    )
    if compact or settings.database_url is None:
        _database_file(settings, "VACUUM FULL")
    with lock_data_folder(settings.data_dir) if compact else nullcontext():
        with closing(open_store(settings)) as store:
            forgotten = store.forget(retention_of(settings))
            entries = 0 if settings.keep_audit_days is None else store.audit.trim(settings.keep_audit_days)
            removed = _remove_orphans(store, settings.storage_path) if orphaned_storage else []
        freed = shrink(settings.database_path) if compact else 0
    kept = {str(what): days for what, days in retention_of(settings).days.items()} | {"audit": settings.keep_audit_days}
    told = {
        "kept_days": kept,
        "forgotten": {str(what): n for what, n in forgotten.items()},
        "audit_entries": entries,
        "removed": removed,
        "freed_bytes": freed,
    }
    lines = ["kept: " + ", ".join(f"{what} {_duration(days)}" for what, days in kept.items())]
    lines += [f"forgot the {what} of {count} jobs" for what, count in forgotten.items()]
    lines += [f"removed {entries} entries of the audit trail"]
    lines += [f"removed {folder}" for folder in removed] + [f"the file is {_mib(freed)} smaller"] * compact
    _tell(told, "\n".join(lines), as_json)


def _remove_orphans(store: "JobStore", storage: Path) -> list[str]:
    """Remove the folders of jobs that the store does not know; which they were."""
    old = time.time() - _GRACE_S
    folders = {path.name: path for path in sorted(storage.glob("job_*")) if path.is_dir() and not path.is_symlink()}
    known = store.states_of(folders)
    orphans = [path for name, path in folders.items() if name not in known and _last_change(path) < old]
    for path in orphans:
        shutil.rmtree(path)
    return [str(path) for path in orphans]


def _last_change(folder: Path) -> float:
    return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))


def _settings(data_dir: Path | None) -> Settings:
    return Settings() if data_dir is None else Settings(data_dir=data_dir)


def _with_days(settings: Settings, **days: float | None) -> Settings:
    """The settings, with what an option says instead."""
    return settings.model_copy(update={f"keep_{what}_days": n for what, n in days.items() if n is not None})


def _duration(days: float | None) -> str:
    return "for ever" if days is None else f"{days:g} days"


def _database_file(settings: Settings, instead: str, *, must_exist: bool = True) -> Path:
    """The SQLite file. Raises: NotHere where there is none, or the database is on a server."""
    if settings.database_url is not None:
        raise NotHere(f"SYNCBN_DATABASE_URL names a PostgreSQL server, whose own tool for this is {instead}")
    if must_exist and not settings.database_path.is_file():
        raise NotHere(f"there is no {settings.database_path}; name the service's folder with --data-dir")
    return settings.database_path


def _tell(told: dict[str, Any], text: str, as_json: bool) -> None:
    typer.echo(json.dumps(told) if as_json else text)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
