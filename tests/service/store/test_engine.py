import multiprocessing
import resource
import sqlite3
import stat
import threading
import time
from pathlib import Path

import pytest

from service.errors import StoreUnavailable
from service.jobs import Job
from service.store import JobStore
from tests.service.store.telling import spec


def test_the_file_is_for_its_owner_alone_and_written_ahead(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    store = JobStore.open(path)
    store.ping()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with sqlite3.connect(path) as other:
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    other.close()
    store.close()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    path.write_bytes(b"something else entirely" * 1000)
    with pytest.raises(StoreUnavailable, match="not a database"):
        JobStore.open(path)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable, match="SYNCBN_DATA_DIR"):
        JobStore.open(tmp_path / "file" / "jobs.sqlite")


def test_a_locked_database_is_unavailable_until_it_is_free(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    store = JobStore.open(path, busy_timeout_s=0.1)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        store.create(spec())
    assert store.unfinished() == []  # readers do not wait for the writer
    other.execute("ROLLBACK")
    other.close()
    job, _ = store.create(spec())
    assert store.unfinished() == [job.model_copy(update={"heartbeat_age_s": None})]
    store.close()


def test_a_writer_of_the_same_process_is_waited_for_no_longer_than_the_timeout(tmp_path: Path) -> None:
    store = JobStore.open(tmp_path / "jobs.sqlite", busy_timeout_s=0.1)
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with store._database.write():
            entered.set()
            leave.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    assert entered.wait(10)
    before = time.monotonic()
    with pytest.raises(StoreUnavailable, match="busy"):
        store.create(spec())
    assert time.monotonic() - before < 5
    leave.set()
    holder.join(10)
    store.create(spec())
    store.close()


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = JobStore.open(tmp_path / "jobs.sqlite")
    store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        store.ping()


def _fill_the_disk(path: Path, verdict: "multiprocessing.Queue[str]") -> None:
    """Write until the system refuses to let the files grow; nothing of the refused transaction may stay."""
    store = JobStore.open(path)
    created: list[Job] = []
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 * 1024, resource.RLIM_INFINITY))
    try:
        for _ in range(10_000):
            created.append(store.create(spec())[0])
    except StoreUnavailable:
        pass
    else:
        verdict.put("the disk never was full")
        return
    stored = {job.id for job in store.unfinished()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if stored != {job.id for job in created}:
        verdict.put("the answered jobs are not the stored ones")
        return
    store.create(spec())
    store.close()
    verdict.put("ok")


def test_a_full_disk_is_unavailable_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    verdict: multiprocessing.Queue[str] = context.Queue()
    child = context.Process(target=_fill_the_disk, args=(tmp_path / "jobs.sqlite", verdict))
    child.start()
    try:
        assert verdict.get(timeout=60) == "ok"
        child.join(30)
        assert child.exitcode == 0
    finally:
        if child.is_alive():
            child.kill()
            child.join()
        verdict.close()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as other:
        assert other.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        lonely = "SELECT count(*) FROM jobs WHERE id NOT IN (SELECT job_id FROM events)"
        assert other.execute(lonely).fetchone() == (0,)
    other.close()
