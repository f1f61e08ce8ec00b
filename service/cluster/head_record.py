"""What a keeper writes down about its Ray head, for every service that comes after."""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil


def process_start(pid: int) -> int:
    """When process ``pid`` started, in clock ticks since boot: with the pid, a name that no later process shares.

    Raises: ProcessLookupError if there is no such process, or only a zombie of it.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessLookupError(f"no process {pid}") from error
    fields = stat.rpartition(")")[2].split()  # the name before it may hold anything, spaces too
    if fields[0] in "ZX":
        raise ProcessLookupError(f"process {pid} has ended")
    return int(fields[19])


@dataclass(frozen=True)
class HeadRecord:
    """A running head: its keeper process, where its job server answers, its token, its folder."""

    keeper_pid: int
    keeper_start: int
    address: str
    token: str
    temp_dir: str

    @property
    def alive(self) -> bool:
        """Whether the very keeper that wrote this still runs."""
        try:
            return process_start(self.keeper_pid) == self.keeper_start
        except ProcessLookupError:
            return False

    def processes(self) -> list[psutil.Process]:
        """Every process that carries the head's token: all that the head ever started, whose child it may be.

        Costs one pass over the machine's processes; those of other users are not seen.
        """
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("RAY_AUTH_TOKEN") == self.token:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def sweep(self) -> None:
        """End what is left of the head after its keeper was killed, and remove its folder."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self.temp_dir, ignore_errors=True)

    def write(self, path: Path) -> None:
        """Put the record at ``path`` in one step, readable by its owner alone: it holds the token."""
        unfinished = path.with_name(path.name + ".new")
        unfinished.unlink(missing_ok=True)
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(self), file)
        unfinished.replace(path)


def read_record(path: Path) -> HeadRecord | None:
    """The record at ``path``; None where there is none, or none that can be understood."""
    try:
        return HeadRecord(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
