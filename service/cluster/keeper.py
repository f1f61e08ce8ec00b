"""The process that leads a local Ray head: starts it, watches it, and leaves nothing of it behind.

Run as ``python -m service.cluster.keeper STATE_DIR --num-cpus N``, in a session of its own, by `LocalRayHead`.
Ray's own parent process cannot be trusted with this: job drivers and agents outlive it. The keeper is
the child subreaper of all of them, so that each stays its descendant even in a process session of its own.
"""

import argparse
import ctypes
import fcntl
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from service.cluster.head_record import HeadRecord, process_start, read_record
from service.cluster.job_server import RayJobServer
from service.errors import ClusterUnreachable

RECORD = "head.json"
HEARTBEAT = "heartbeat"
LOCK = "keeper.lock"

_TICK_S = 0.2
_START_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 30.0
_OBJECT_STORE_BYTES = 80_000_000  # what Ray asks for at least; ranks exchange tensors over gloo or NCCL, not here
_MAX_TEMP_DIR = 40  # a Unix socket's path ends at 107 letters, and Ray adds up to 66 of its own
_RAYS_OWN = "s"
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main(arguments: list[str] | None = None) -> int:
    """Keep one head for ``STATE_DIR`` until told to end, until Ray ends, or until nobody has cared for too long."""
    parser = argparse.ArgumentParser(prog="service.cluster.keeper", description=__doc__)
    parser.add_argument("state_dir", type=Path)
    parser.add_argument("--num-cpus", type=int, required=True)
    parser.add_argument("--orphan-grace-s", type=float, default=900.0)
    options = parser.parse_args(arguments)
    with _only_keeper(options.state_dir) as first:
        if not first:
            print(f"another keeper holds {options.state_dir / LOCK}", flush=True)  # noqa: T201  # the log is read by people
            return 0  # its record is the answer
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, _leave)
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        if stale := read_record(options.state_dir / RECORD):  # of a keeper that was killed
            stale.sweep()
            (options.state_dir / RECORD).unlink()
        return _keep(options.state_dir, options.num_cpus, options.orphan_grace_s)


def _keep(state_dir: Path, num_cpus: int, orphan_grace_s: float) -> int:
    temp_dir = _short_temp_dir()
    try:
        (state_dir / HEARTBEAT).touch()
        ports = dict(zip(("gcs", "dashboard", "client", "agent"), _free_ports(4), strict=True))
        address, token = f"http://127.0.0.1:{ports['dashboard']}", secrets.token_hex(32)
        record = HeadRecord(os.getpid(), process_start(os.getpid()), address, token, str(temp_dir))
        ray = subprocess.Popen(
            _ray_command(num_cpus, ports, temp_dir),
            env=_ray_environment(token, temp_dir),
            cwd=temp_dir,  # also the folder of every job: empty, so that no file in it shadows a module
            stdin=subprocess.DEVNULL,
            preexec_fn=_end_with_parent,  # safe here: the keeper has one thread
        )
        _wait_until_ready(record, ray.pid)
        record.write(state_dir / RECORD)
        _watch(ray.pid, state_dir / HEARTBEAT, orphan_grace_s)
        return 0
    finally:
        _end_descendants()
        own = read_record(state_dir / RECORD)
        if own and own.keeper_pid == os.getpid():
            (state_dir / RECORD).unlink()
        shutil.rmtree(temp_dir, ignore_errors=True)


def _ray_command(num_cpus: int, ports: dict[str, int], temp_dir: Path) -> list[str]:
    return [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        "--no-monitor",  # the autoscaler's: nothing here scales
        "--disable-usage-stats",
        "--include-dashboard=true",  # the job server is part of it
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={ports['dashboard']}",
        f"--port={ports['gcs']}",
        f"--ray-client-server-port={ports['client']}",
        f"--dashboard-agent-listen-port={ports['agent']}",
        "--min-worker-port=0",  # any free port, instead of 10002 and on, which two heads would share
        "--max-worker-port=0",
        f"--num-cpus={num_cpus}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
        f"--temp-dir={temp_dir / _RAYS_OWN}",
    ]


def _ray_environment(token: str, temp_dir: Path) -> dict[str, str]:
    """The environment of the head and of all jobs: ours without what would redirect Ray, and without our secrets."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SYNCBN_"))}
    return inherited | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "TMPDIR": str(temp_dir),  # whatever a killed process leaves goes with the head
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Off, Ray takes 127.0.0.1 as it is and every part of it listens on loopback alone, metrics ports included.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Ray's 15 lets whatever else wakes up push a rank off its core, and all ranks wait for that one: of the same
        # two ranks, set to 15 and to 0 in turns on two busy cores, a step took 1.5 times as long at 15.
        "RAY_worker_niceness": "0",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _wait_until_ready(record: HeadRecord, ray_pid: int) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    with RayJobServer(record.address, record.token) as server:
        while time.monotonic() < deadline:
            try:
                if server.nodes():
                    return
            except ClusterUnreachable:
                pass  # not yet; the deadline bounds this
            if not _reap(ray_pid):
                raise SystemExit("ray start ended before its job server answered; its words are above")
            time.sleep(_TICK_S)
    raise SystemExit(f"the job server at {record.address} did not answer within {_START_TIMEOUT_S:g} s")


def _watch(ray_pid: int, heartbeat: Path, orphan_grace_s: float) -> None:
    """Return when Ray has ended, or when ``heartbeat`` has not been touched for ``orphan_grace_s``.

    Counted from the last change seen, on the monotonic clock: neither a set clock nor a sleeping laptop ends jobs.
    """
    last_beat, seen_at = -1, time.monotonic()
    while _reap(ray_pid):
        beat = heartbeat.stat().st_mtime_ns if heartbeat.exists() else last_beat
        if beat != last_beat:
            last_beat, seen_at = beat, time.monotonic()
        if time.monotonic() - seen_at > orphan_grace_s:
            return
        time.sleep(_TICK_S)


def _reap(ray_pid: int) -> bool:
    """Take in every dead descendant, as a subreaper must; False once ``ray_pid`` was among them."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == ray_pid:
            return False
        if pid == 0:
            return True


def _end_descendants() -> None:
    """Kill until none is left: what is killed may have been forking."""
    deadline = time.monotonic() + _END_TIMEOUT_S
    while time.monotonic() < deadline:
        children = psutil.Process().children(recursive=True)
        if not children:
            return
        for process in children:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        _reap(0)
        time.sleep(0.02)


@contextmanager
def _only_keeper(state_dir: Path) -> Iterator[bool]:
    """Whether this is the one keeper of ``state_dir``; it stays so until the end of the block, or of the process."""
    with (state_dir / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _short_temp_dir() -> Path:
    """A folder that others of this machine cannot enter.

    Ray opens its own below it to everyone, and writes every job's environment, an attempt's token too, into its logs.
    """
    folder, name_length = tempfile.gettempdir(), 20 + len(f"/{_RAYS_OWN}")
    short_enough = len(folder) <= _MAX_TEMP_DIR - name_length
    return Path(tempfile.mkdtemp(prefix="syncbn-ray-", dir=folder if short_enough else "/tmp"))  # noqa: S108


def _free_ports(count: int) -> list[int]:
    """Loopback ports that nobody has now, below those that the system gives to outgoing connections."""
    found: set[int] = set()
    while len(found) < count:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.add(port)
    return list(found)


def _end_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def _leave(signum: int, _frame: FrameType | None) -> NoReturn:
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)  # once is enough; tidying up must not be cut short
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
