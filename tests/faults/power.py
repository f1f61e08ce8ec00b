"""A disk that loses its power: a small file system of its own, and copies of what had reached its disk at a moment."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_TIMEOUT_S = 60.0


class Disk:
    """An ext4 file system in the file ``image``.

    What programs write stays in the memory of the system until they wait for the disk; nothing else brings it there
    within ``commit`` seconds. So a copy of the image has what a power cut would have left, and nothing more.
    """

    def __init__(self, image: Path) -> None:
        self.image = image

    def lose_power(self, copy: Path) -> "Disk":
        """The disk as it would be found if the power failed now; not mounted yet."""
        subprocess.run(["cp", "--sparse=always", self.image, copy], check=True, timeout=_TIMEOUT_S)
        return Disk(copy)

    @contextmanager
    def mounted(self) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(prefix="syncbn-disk-"))
        folder.chmod(0o755)  # a server of another user's must come to its files
        try:
            # Once unmounted, the loop device frees itself.
            subprocess.run(["mount", "-o", "loop,commit=300", self.image, folder], check=True, timeout=_TIMEOUT_S)
            try:
                yield folder
            finally:
                subprocess.run(["umount", folder], check=True, timeout=_TIMEOUT_S)
        finally:
            folder.rmdir()


def new_disk(image: Path, size_mib: int) -> Disk:
    """A fresh disk; skips the test where none can be made."""
    with image.open("wb") as file:
        file.truncate(size_mib * 2**20)
    disk = Disk(image)
    try:
        subprocess.run(["mkfs.ext4", "-q", image], check=True, capture_output=True, timeout=_TIMEOUT_S)
        with disk.mounted():
            pass
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs root, mkfs.ext4 and a loop device: mounts a file system of its own")
    return disk


def write_unsynced(path: Path) -> None:
    """Write without waiting for the disk: gone after a power cut, or the disk proves nothing."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        os.write(descriptor, b"in the memory of the system")
    finally:
        os.close(descriptor)
