import sqlite3
import stat
import threading
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from service.jobs import JobState, attempt_id
from service.store import STEP, JobStore
from service.store.backup import BackupRefused, back_up, compact, restore
from tests.service.store.telling import batch, spec, started, step

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def _filled(path: Path, name: str) -> list[str]:
    """Ids of two jobs in a store that is closed again; the first has told 3,000 steps."""
    store = JobStore.open(path)
    job, token = store.start_attempt(store.create(spec(name))[0])
    store.ingest(attempt_id(job.id, 1), token, batch([started(), *(step(n, 1 / n) for n in range(1, 3_001))]))
    other, _ = store.create(spec(name))
    store.close()
    return [job.id, other.id]


def _contents(path: Path) -> list[str]:
    """Every row and table, in no particular order."""
    with sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True) as connection:
        dump = sorted(connection.iterdump())
    connection.close()
    return dump


def test_a_backup_holds_everything_in_one_private_file_and_comes_back_whole(tmp_path: Path) -> None:
    path, copy = tmp_path / "jobs.sqlite", tmp_path / "copy.sqlite"
    first, second = _filled(path, "digits")
    store = JobStore.open(path)
    before = store.metric(first, "train/loss", max_points=None)
    made = back_up(path, copy)  # while the store is open
    assert (made.path, made.num_jobs, made.size_bytes) == (copy, 2, copy.stat().st_size)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    later, _ = store.create(spec("later"))
    store.close()
    done = restore(path, copy, NOW)
    assert done.num_jobs == 2
    assert done.kept is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy.sqlite", "jobs.sqlite", done.kept.name]
    store = JobStore.open(path)
    assert store.metric(first, "train/loss", max_points=None) == before
    assert {job.id for job in store.unfinished()} == {first, second}
    store.close()
    kept = JobStore.open(done.kept)
    assert kept.get(later.id).state is JobState.QUEUED
    kept.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_backup_while_others_write_is_one_moment(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    store = JobStore.open(path)
    job, _ = store.start_attempt(store.create(spec())[0])
    ending = threading.Event()

    def write() -> None:
        number = 0
        while not ending.is_set():  # each transaction tells one step of two ranks
            number += 1
            told = np.zeros(2, STEP)
            told["rank"], told["step"], told["loss"] = [0, 1], number, [number, -number]
            store.record_steps(job.id, 1, told)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(5):
            back_up(path, tmp_path / f"{number}.sqlite")
    finally:
        ending.set()
        writer.join(30)
    store.close()
    lengths = []
    for number in range(5):
        copy = JobStore.open(tmp_path / f"{number}.sqlite")
        ranks = [copy.metric(job.id, "train/loss", rank=rank, max_points=None) for rank in range(2)]
        copy.close()
        assert ranks[0].steps == ranks[1].steps
        assert ranks[0].values == tuple(-value for value in ranks[1].values)
        lengths.append(len(ranks[0].steps))
    assert lengths == sorted(lengths)
    assert lengths[-1] > 0


def test_a_backup_of_an_older_schema_comes_back_in_the_new_one(tmp_path: Path) -> None:
    path, old = tmp_path / "jobs.sqlite", tmp_path / "old.sqlite"
    ids = _filled(path, "digits")
    back_up(path, old)
    _go_back_to_the_schema_before(old)
    path.unlink()
    assert restore(path, old, NOW).kept is None
    store = JobStore.open(path)
    assert {job.id for job in store.unfinished()} == set(ids)
    assert store.metric(ids[0], "train/loss", rank=0).num_points == 3_000
    store.close()


def _go_back_to_the_schema_before(path: Path) -> None:
    from alembic import command
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    from service.store.upgrade import migrations

    with create_engine(f"sqlite:///{path}", poolclass=NullPool).begin() as connection:
        command.downgrade(migrations(connection), "0002_order_and_leases")
        rows = connection.exec_driver_sql("SELECT count(*), sum(loss), max(step) FROM steps").one()
    assert rows == (3_000, pytest.approx(sum(1 / n for n in range(1, 3_001)), rel=1e-12), 3_000)  # chunks became rows


def test_what_is_no_backup_changes_nothing(tmp_path: Path) -> None:
    path, copy = tmp_path / "jobs.sqlite", tmp_path / "copy.sqlite"
    _filled(path, "digits")
    back_up(path, copy)
    before = _contents(path)
    damaged, newer, other = tmp_path / "damaged", tmp_path / "newer", tmp_path / "other"
    content = bytearray(copy.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 20_000] = bytes(20_000)
    damaged.write_bytes(content)
    newer.write_bytes(copy.read_bytes())
    with sqlite3.connect(newer) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999_of_tomorrow'")
    connection.close()
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE jobs (id TEXT)")
    connection.close()
    (tmp_path / "text").write_text("no database " * 1000)
    for name, why in [
        ("damaged", "damaged|malformed"),
        ("newer", "9999_of_tomorrow"),
        ("other", "something else"),
        ("text", "not a database"),
        ("absent", "unable to open"),
    ]:
        with pytest.raises(BackupRefused, match=why):
            restore(path, tmp_path / name, NOW)
        assert _contents(path) == before
    with pytest.raises(BackupRefused, match="exists; a backup never overwrites"):
        back_up(path, copy)
    with pytest.raises(BackupRefused, match="cannot write"):
        back_up(path, tmp_path / "no folder" / "copy")
    with pytest.raises(BackupRefused, match="unable to open"):
        back_up(tmp_path / "absent", tmp_path / "copy of nothing")
    names = {"jobs.sqlite", "copy.sqlite", "damaged", "newer", "other", "text"}
    assert {p.name for p in tmp_path.iterdir()} == names


def test_a_damaged_database_is_kept_with_its_log_when_a_backup_replaces_it(tmp_path: Path) -> None:
    path, copy = tmp_path / "jobs.sqlite", tmp_path / "copy.sqlite"
    ids = _filled(path, "digits")
    back_up(path, copy)
    path.write_bytes(b"ruined" * 10_000)
    (tmp_path / "jobs.sqlite-wal").write_bytes(b"log")
    done = restore(path, copy, NOW)
    assert done.kept == tmp_path / "jobs.sqlite.before-20260102T030405678901Z"
    assert done.kept.read_bytes() == b"ruined" * 10_000
    assert (tmp_path / f"{done.kept.name}-wal").read_bytes() == b"log"
    store = JobStore.open(path)
    assert {job.id for job in store.unfinished()} == set(ids)
    store.close()


def test_compacting_gives_back_what_was_freed(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    _filled(path, "digits")
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE ballast AS SELECT zeroblob(4000000)")
        connection.execute("DROP TABLE ballast")
    connection.close()
    before, size = _contents(path), path.stat().st_size
    assert compact(path) >= 4_000_000
    assert path.stat().st_size <= size - 4_000_000
    assert _contents(path) == before
