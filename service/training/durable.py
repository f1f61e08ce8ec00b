"""Files that are whole or not there, whatever happens to the machine while they are written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write ``path`` under another name in the same folder, flush it to the disk and rename it.

    Raises: OSError if the disk is full or fails; what was at ``path`` is then untouched, and nothing is left over.
    """
    temporary = path.with_name(f".{path.name}.part")
    with _removed_on_failure(temporary), temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    _sync_folder(path.parent)


@contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    # A rename is on the disk only once the folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
