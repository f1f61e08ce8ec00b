"""A cluster at the `Launcher` seam that lives in a file, so that it outlives whoever launches and is killed."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from service.jobs import LaunchRequest
from service.scheduler import ClusterCapacity, LaunchState, NodeResources, Observation


@dataclass(frozen=True)
class Entry:
    """One line of the journal: an attempt was launched (then with its token), asked for again, or has ended."""

    what: str
    attempt: str
    token: str = ""


class JournalCluster:
    """Implements `service.scheduler.Launcher`; ``before_writing`` is called before each line is written."""

    def __init__(self, path: Path, before_writing: Callable[[str], None] = lambda what: None) -> None:
        self._path = path
        self._before_writing = before_writing

    def entries(self) -> list[Entry]:
        if not self._path.exists():
            return []
        return [Entry(**json.loads(line)) for line in self._path.read_text().splitlines()]

    def alive(self) -> dict[str, str]:
        """The attempts that were launched and have not ended, each with its token."""
        alive: dict[str, str] = {}
        for entry in self.entries():
            if entry.what == "launch":
                alive[entry.attempt] = entry.token
            elif entry.what != "again":
                del alive[entry.attempt]
        return alive

    def finish(self, attempt_id: str, state: LaunchState) -> None:
        self._write(Entry(state, attempt_id))

    def capacity(self) -> ClusterCapacity:
        return ClusterCapacity((NodeResources(cpus=8, gpus=0, memory_gib=64),))

    def launch(self, request: LaunchRequest, ingest_token: str) -> None:
        known = self.observe(request.attempt_id).state is not LaunchState.UNKNOWN
        self._write(Entry("again" if known else "launch", request.attempt_id, ingest_token))

    def observe(self, attempt_id: str) -> Observation:
        words = [entry.what for entry in self.entries() if entry.attempt == attempt_id and entry.what != "again"]
        if not words:
            return Observation(LaunchState.UNKNOWN)
        return Observation(LaunchState.RUNNING if words[-1] == "launch" else LaunchState(words[-1]))

    def stop(self, attempt_id: str) -> None:
        if attempt_id in self.alive():
            self.finish(attempt_id, LaunchState.STOPPED)

    def output(self, attempt_id: str) -> str:
        return f"last lines of {attempt_id}"

    def _write(self, entry: Entry) -> None:
        self._before_writing(f"cluster: {entry.what}")
        line = json.dumps({"what": entry.what, "attempt": entry.attempt, "token": entry.token}) + "\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, line.encode())  # one write: the line is there or not
        finally:
            os.close(descriptor)
