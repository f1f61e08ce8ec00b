"""One service per data folder: an advisory lock that the system releases however its holder ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.errors import ServiceError


class DataFolderInUse(ServiceError):
    """Another service works on the same data folder."""

    code = "data_folder_in_use"
    title = "The data folder is in use"


@contextmanager
def lock_data_folder(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; raises `DataFolderInUse` naming the holder's process id."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode() or "unknown"
            raise DataFolderInUse(
                f"data folder {folder} is in use by a service with process id {holder}; "
                "stop that one, or choose another folder with --data-dir or SYNCBN_DATA_DIR"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)
