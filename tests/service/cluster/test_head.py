"""A local Ray head from birth to end: adopted, orphaned, killed, and nothing left of it."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from service.cluster.head import LocalRayHead
from service.cluster.head_record import HeadRecord, read_record
from service.errors import ClusterUnreachable
from tests.service.cluster.waiting import is_gone, wait_until

OWNER = """
import sys, time
from pathlib import Path
from service.cluster.head import LocalRayHead
print(*LocalRayHead(Path(sys.argv[1]), 2, orphan_grace_s=float(sys.argv[2]), start_timeout_s=100).ensure(), flush=True)
time.sleep(600)
"""


def record_of(head: LocalRayHead) -> HeadRecord:
    record = read_record(head.state_dir / "head.json")
    assert record is not None
    return record


def children_of(record: HeadRecord) -> list[psutil.Process]:
    """The lasting processes of a head: short-lived ones may end while they are looked at."""
    names = ("gcs_server", "raylet", "ray", "ray::Dash", "ray::Runtime")
    return [process for process in record.processes() if process.name().startswith(names)]


def assert_nothing_left(record: HeadRecord) -> None:
    assert record.processes() == []
    assert not Path(record.temp_dir).exists()


def test_a_head_outlives_its_service_is_adopted_and_ends_when_nobody_cares(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    command = [sys.executable, "-c", OWNER, str(tmp_path / "head"), "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"HOME": str(home)}) as owner:
        assert owner.stdout is not None
        started = tuple(owner.stdout.readline().split())
        owner.kill()
    head = LocalRayHead(tmp_path / "head", 2)
    record = record_of(head)
    try:
        assert head.ensure() == started
        assert record_of(head) == record
        assert (head.state_dir / "head.json").stat().st_mode & 0o777 == 0o600
        cared_until = time.monotonic() + 4  # longer than the grace
        while time.monotonic() < cared_until:
            head.touch()
            assert record.alive
            time.sleep(0.1)
        wait_until(lambda: not record.alive, 20, "the end of an orphan")
        assert_nothing_left(record)
        assert not (head.state_dir / "head.json").exists()
        assert list(home.rglob("*")) == []
    finally:
        head.stop()


def test_a_killed_keeper_leaves_nothing_to_its_successor(tmp_path: Path) -> None:
    head = LocalRayHead(tmp_path / "head", 2, start_timeout_s=100)
    try:
        head.ensure()
        record = record_of(head)
        head.connect().submit("survivor", "setsid sleep 1000 & exec sleep 1000", {})
        sleeping = wait_until(
            lambda: [p for p in record.processes() if p.name() == "sleep" and p.cmdline()[-1] == "1000"][1:],
            60,
            "the job",
        )
        ips = {c.laddr.ip for p in children_of(record) for c in p.net_connections("tcp") if c.status == "LISTEN"}
        assert ips <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}

        os.kill(record.keeper_pid, signal.SIGKILL)
        wait_until(lambda: not record.alive, 10, "the keeper's end")
        successor = LocalRayHead(head.state_dir, 2, start_timeout_s=0.01)
        with pytest.raises(ClusterUnreachable, match="still starting"):
            successor.ensure()
        wait_until(lambda: not record.processes(), 30, "the end of what the killed keeper left")
        assert all(is_gone(process.pid) for process in sleeping)
        successor.stop()
        assert_nothing_left(record)
    finally:
        head.stop()


def test_a_head_that_cannot_start_says_why(tmp_path: Path) -> None:
    head = LocalRayHead(tmp_path, 1)
    with (tmp_path / "keeper.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ClusterUnreachable, match=r"did not start: another keeper holds .*keeper\.lock"):
            head.ensure()


def test_a_record_of_another_process_is_not_believed(tmp_path: Path) -> None:
    own = psutil.Process()
    fields = {"keeper_pid": own.pid, "keeper_start": 1, "address": "http://127.0.0.1:1", "token": "t", "temp_dir": ""}
    (tmp_path / "head.json").write_text(json.dumps(fields))
    record = read_record(tmp_path / "head.json")
    assert record is not None
    assert not record.alive
    LocalRayHead(tmp_path, 1).stop()
    assert not is_gone(own.pid)


def test_others_of_this_machine_cannot_enter_where_ray_writes(ray_head: LocalRayHead) -> None:
    """Ray opens its own folder to everyone, and its logs tell the environment of every job."""
    ray_head.ensure()
    folder = Path(record_of(ray_head).temp_dir)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.rglob("raylet.out"))
