"""Tells the story again and again, each time in a process that is killed one instruction later: a program of its own.

``python -m tests.faults.crashing FOLDER EVERY [URL]`` prints a line for each process: its folder, and before which
instruction it was killed; "the end" for the last one, which nothing killed. Each has a SQLite file in its folder, or a
database of its own on the PostgreSQL server at ``URL``. An instruction is whatever changes
something that outlives the process: a statement that writes, a commit, a word to the cluster. Between two of them a
killed process leaves the same things behind wherever it dies.
"""

import os
import signal
import sys
from itertools import count
from pathlib import Path

from sqlalchemy import Engine, event

from service.log import configure_log
from tests.faults.databases import Databases, Files, OnServer
from tests.faults.journal_cluster import JournalCluster
from tests.faults.story import Story

JOURNAL = "cluster.jsonl"
THE_END = "the end"


class Fuse:
    """Kills this process, as the system or an operator would, before its instruction number ``length``."""

    def __init__(self, length: int, note: Path) -> None:
        self._left = length
        self._note = note
        self._wrote = False

    def burn(self, instruction: str) -> None:
        self._left -= 1
        if self._left == 0:
            self._note.write_text(instruction)
            os.kill(os.getpid(), signal.SIGKILL)

    def lay(self) -> None:
        """From now on statements and commits of every engine in this process count."""
        event.listen(Engine, "before_cursor_execute", lambda *given: self._statement(given[2]))
        event.listen(Engine, "commit", lambda connection: self._commit())

    def _statement(self, statement: str) -> None:
        words = statement.split(maxsplit=3)
        if words[0] in ("INSERT", "UPDATE", "DELETE"):
            self.burn(" ".join(words[:3]))
            self._wrote = True

    def _commit(self) -> None:
        if self._wrote:
            self.burn("COMMIT")
            self._wrote = False


def main() -> None:
    configure_log(as_json=True)  # to stderr: what is said on stdout is read
    folder, every, url = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    databases = OnServer(*url) if url else Files()
    databases.prepare(folder)
    for length in count(1, every):
        own = folder / str(length)
        own.mkdir()
        databases.add(own)
        killed_before = _tell_in_child(own, databases, length)
        sys.stdout.write(f"{own} {killed_before}\n")
        sys.stdout.flush()
        if killed_before == THE_END:
            return


def _tell_in_child(folder: Path, databases: Databases, length: int) -> str:
    # Forked, because importing all this takes longer than the story; this process has one thread and no database.
    child = os.fork()
    if child == 0:
        _tell(folder, databases, length)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return (folder / "killed").read_text()
    if status != 0:
        raise SystemExit(f"the story in {folder} failed by itself")
    return THE_END


def _tell(folder: Path, databases: Databases, length: int) -> None:
    try:
        fuse = Fuse(length, folder / "killed")
        store = databases.open(folder)
        fuse.lay()
        Story(store, JournalCluster(folder / JOURNAL, fuse.burn), folder).tell()
        store.close()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
