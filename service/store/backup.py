"""Copies of an SQLite database: made while a service works on it, and put back when none does.

A copy is whole before it bears its name: it is written beside, checked and only then renamed, so that neither a crash
nor a full disk leaves half a backup, or half a database.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from service.errors import ServiceError, StoreUnavailable
from service.store.sqlite import open_sqlite

_BUSY_S = 30.0


class BackupRefused(ServiceError):
    """A copy cannot be made, or must not be put back; nothing has changed."""

    code = "backup_refused"
    title = "The backup cannot be used"


@dataclass(frozen=True)
class Copy:
    """A copy that was made: of how many jobs, in how many bytes."""

    path: Path
    num_jobs: int
    size_bytes: int


@dataclass(frozen=True)
class Restored:
    """What is now the database, and where the one before is kept, if there was one."""

    num_jobs: int
    kept: Path | None


def back_up(database: Path, target: Path) -> Copy:
    """Copy the database to the new file ``target``, as it is at one moment, readable by its owner alone.

    Neither readers nor writers wait meanwhile. Raises: BackupRefused where there is no database, where ``target``
    exists or cannot be written, or where the copy is not sound.
    """
    if target.exists():
        raise BackupRefused(f"{target} exists; a backup never overwrites, so choose another name")
    with _new_file(target.with_name(target.name + ".part")) as part:
        _copy(database, part, "rw")
        num_jobs = _check(part, database)
        try:
            os.link(part, target)  # unlike a rename, fails where another has made the file meanwhile
        except OSError as error:
            raise BackupRefused(f"cannot make {target}: {error.strerror}") from None
        _sync(target.parent)
    return Copy(target, num_jobs, target.stat().st_size)


def restore(database: Path, source: Path, now: datetime) -> Restored:
    """Put the backup ``source`` in the database's place. The caller holds the data folder's lock.

    The backup is copied, checked and brought to this service's schema beside the database first; then the database
    is kept under another name and the copy takes its place. Raises: BackupRefused where the backup is not sound, not
    of this service, or of a newer one.
    """
    database.parent.mkdir(parents=True, exist_ok=True)
    with _new_file(database.with_name(database.name + ".restoring")) as part:
        _copy(source, part, "ro")
        num_jobs = _check(part, source)
        try:
            open_sqlite(part, _BUSY_S).close()
        except StoreUnavailable as error:
            raise BackupRefused(f"{source} cannot be used: {error}") from None
        _fold(part)
        kept = _set_aside(database, f"{database.name}.before-{now:%Y%m%dT%H%M%S%fZ}") if database.exists() else None
        part.replace(database)
        _sync(database.parent)
    return Restored(num_jobs, kept)


def compact(database: Path) -> int:
    """Give what was freed in the file back to the disk; how many bytes. Needs as much room meanwhile as is left then.

    The caller holds the data folder's lock. Raises: BackupRefused.
    """
    before = _size(database)
    with _refusals(database), closing(_open(database)) as connection:
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return max(before - _size(database), 0)


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A file for its owner alone, gone at the end unless it has another name by then."""
    try:
        path.unlink(missing_ok=True)
        path.touch(mode=0o600, exist_ok=False)
    except OSError as error:
        raise BackupRefused(f"cannot write {path}: {error.strerror}") from None
    try:
        yield path
    finally:
        for name in (path, *_companions(path)):
            name.unlink(missing_ok=True)


def _copy(source: Path, target: Path, mode: str) -> None:
    with _refusals(source), closing(_open(source, mode)) as origin, closing(sqlite3.connect(target)) as copy:
        # All at once: with write-ahead logging that keeps nobody waiting, and in steps each writer would restart it.
        origin.backup(copy, pages=-1, progress=_do_not_wait)
        copy.execute("PRAGMA journal_mode = DELETE")


def _do_not_wait(status: int, remaining: int, total: int) -> None:
    if status in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        raise sqlite3.OperationalError(f"it was locked for {_BUSY_S:g} s")


def _check(copy: Path, source: Path) -> int:
    """The number of jobs in a copy that is sound. Raises: BackupRefused."""
    with _refusals(source), closing(sqlite3.connect(copy)) as connection:
        verdict = [text for (text,) in connection.execute("PRAGMA integrity_check(3)")]
        if verdict != ["ok"]:
            raise BackupRefused(f"{source} is damaged: {'; '.join(verdict)}")
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        if not {"schema_version", "jobs"} <= tables:
            raise BackupRefused(f"{source} is a database of something else: it has no jobs")
        return int(connection.execute("SELECT count(*) FROM jobs").fetchone()[0])


def _fold(database: Path) -> None:
    """Let the file alone hold everything, without the log beside it."""
    with _refusals(database), closing(_open(database)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")


def _set_aside(database: Path, name: str) -> Path:
    """Keep the database under another name too, with its log; a log left behind would spoil the one that follows."""
    if _is_readable(database):
        _fold(database)
    kept = database.with_name(name)
    try:
        os.link(database, kept)
    except OSError as error:
        raise BackupRefused(f"cannot keep {database} as {kept.name}: {error.strerror}") from None
    for log in _companions(database):
        if log.exists():
            log.replace(kept.with_name(kept.name + log.name.removeprefix(database.name)))
    return kept


def _is_readable(database: Path) -> bool:
    """Whether SQLite knows what to do with the file; of one that is damaged, writing could throw away the log."""
    try:
        with closing(_open(database, "ro")) as connection:
            connection.execute("SELECT count(*) FROM sqlite_schema")
        return True
    except sqlite3.Error:
        return False


def _open(database: Path, mode: str = "rw") -> sqlite3.Connection:
    """A connection to a file that exists; a mere path would be made."""
    return sqlite3.connect(f"{database.absolute().as_uri()}?mode={mode}", uri=True, timeout=_BUSY_S)


@contextmanager
def _refusals(database: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise BackupRefused(f"{database} cannot be used: {error}") from None


def _companions(database: Path) -> list[Path]:
    return [database.with_name(database.name + end) for end in ("-wal", "-shm", "-journal")]


def _size(database: Path) -> int:
    return sum(path.stat().st_size for path in (database, *_companions(database)) if path.exists())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
