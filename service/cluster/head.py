"""The local Ray head, as the service sees it: started when needed, adopted when it is already there."""

import os
import sys
import threading
import time
from pathlib import Path

import psutil

from service.cluster.head_record import HeadRecord, read_record
from service.cluster.job_server import RayJobServer
from service.cluster.keeper import HEARTBEAT, RECORD
from service.errors import ClusterUnreachable

KEEPER_LOG = "keeper.log"

_TICK_S = 0.05


class LocalRayHead:
    """A Ray head of this machine, kept by a process of its own so that jobs outlive the service.

    ``state_dir`` (made if missing) holds all that is known of it: a later service with the same folder adopts the
    head. It offers ``num_cpus`` logical CPUs, listens on loopback alone, and asks for a token. Its keeper ends
    it, jobs included, once `touch` has not been called for ``orphan_grace_s``. A head that is adopted keeps its own
    CPUs and grace until it ends. Safe to share between threads.
    """

    def __init__(
        self, state_dir: Path, num_cpus: int, *, orphan_grace_s: float = 900.0, start_timeout_s: float = 30.0
    ) -> None:
        if num_cpus < 1:
            raise ValueError(f"num_cpus is {num_cpus}; a head needs at least 1")
        self.state_dir = state_dir.absolute()
        self.num_cpus = num_cpus
        self.orphan_grace_s = orphan_grace_s
        self.start_timeout_s = start_timeout_s
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._keeper_pid: int | None = None
        self._server: RayJobServer | None = None

    def ensure(self) -> tuple[str, str]:
        """The head's address and token; starts a head if none runs, which takes some seconds.

        Raises: ClusterUnreachable with the last words of Ray if it does not come up, or while it has not yet come up
            after ``start_timeout_s``: it goes on starting, and a later call finds it.
        """
        server = self.connect()
        assert server.token is not None
        return server.address, server.token

    def connect(self) -> RayJobServer:
        """The job server of the running head, as `ensure` gives it. One object as long as the head is the same."""
        with self._lock:
            self.state_dir.mkdir(parents=True, exist_ok=True)
            self.touch()
            record = self._running() or self._start()
            if self._server is None or (self._server.address, self._server.token) != (record.address, record.token):
                self._server = RayJobServer(record.address, record.token)
            return self._server

    def touch(self) -> None:
        """Tell the keeper that somebody still cares. Call at least a few times per ``orphan_grace_s``."""
        if self.state_dir.is_dir():
            (self.state_dir / HEARTBEAT).touch()

    def stop(self, timeout_s: float = 60.0) -> None:
        """End the head with every job on it, and wait until no process is left. Without a head, nothing happens.

        Raises: ClusterUnreachable if the keeper is still there after ``timeout_s``.
        """
        self._stopping.set()  # who waits for a start gives up, and with it the lock
        try:
            with self._lock:
                self._end(timeout_s)
        finally:
            self._stopping.clear()

    def _end(self, timeout_s: float) -> None:
        record = read_record(self.state_dir / RECORD)
        pid = record.keeper_pid if record and record.alive else self._keeper_pid
        if pid is not None:
            _terminate(pid, timeout_s)
        if (rest := read_record(self.state_dir / RECORD)) and not rest.alive:  # the keeper was killed before
            rest.sweep()
            (self.state_dir / RECORD).unlink()
        self._keeper_pid = None
        if self._server is not None:
            self._server.close()
            self._server = None

    def _running(self) -> HeadRecord | None:
        record = read_record(self.state_dir / RECORD)
        return record if record and record.alive else None

    def _start(self) -> HeadRecord:
        if self._keeper_pid is None or _ended(self._keeper_pid):
            self._keeper_pid = self._spawn_keeper()
        deadline = time.monotonic() + self.start_timeout_s
        while time.monotonic() < deadline:
            if record := self._running():
                return record
            if _ended(self._keeper_pid) and not self._running():
                self._keeper_pid = None
                raise ClusterUnreachable(f"the local Ray head did not start: {self._last_words()}")
            if self._stopping.wait(_TICK_S):
                raise ClusterUnreachable("the local Ray head is being stopped")
        raise ClusterUnreachable(
            f"the local Ray head has not come up within {self.start_timeout_s:g} s and is still starting; "
            f"is this machine overloaded? See {self.state_dir / KEEPER_LOG}"
        )

    def _spawn_keeper(self) -> int:
        """A plain spawn rather than a Popen object: the keeper is meant to outlive whoever started it."""
        command = [sys.executable, "-P", "-m", "service.cluster.keeper", str(self.state_dir)]
        command += [f"--num-cpus={self.num_cpus}", f"--orphan-grace-s={self.orphan_grace_s}"]
        log = os.open(self.state_dir / KEEPER_LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        try:
            actions = [(os.POSIX_SPAWN_DUP2, nothing, 0), (os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
            return os.posix_spawn(sys.executable, command, os.environ, file_actions=actions, setsid=True)
        finally:
            os.close(log)
            os.close(nothing)

    def _last_words(self) -> str:
        try:
            lines = (self.state_dir / KEEPER_LOG).read_text(errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        told = [line.strip() for line in lines if line.strip()]
        return " | ".join(told[-3:]) or f"no words in {self.state_dir / KEEPER_LOG}"


def _ended(pid: int) -> bool:
    """Whether a process is gone; takes in its remains if it was our child."""
    try:
        psutil.Process(pid).wait(timeout=0)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


def _terminate(pid: int, timeout_s: float) -> None:
    try:
        process = psutil.Process(pid)
        process.terminate()
        process.wait(timeout=timeout_s)
    except psutil.NoSuchProcess:
        return
    except psutil.TimeoutExpired as error:
        raise ClusterUnreachable(
            f"the keeper of the local Ray head (pid {pid}) did not end in {timeout_s:g} s"
        ) from error
