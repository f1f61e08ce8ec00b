"""The folders that settings name: to be written, to be read from, and to be kept from others' eyes."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from service.doctor.finding import Finding, judge
from service.settings import Settings
from service.webhooks import SecretFiles, SecretUnreadable

_MIN_FREE_GIB = 1.0


def look_at_folders(settings: Settings) -> Iterator[Finding]:
    """Each check of them."""
    yield _writable("data folder", settings.data_dir, "SYNCBN_DATA_DIR")
    if settings.storage is not None:
        yield _writable("storage folder", settings.storage, "SYNCBN_STORAGE")
    yield _disk(settings)
    if settings.data_roots is not None:
        yield _data_roots(settings.data_roots)
    if settings.secrets_dir is not None:
        yield _secrets(settings.secrets_dir)


def _writable(check: str, folder: Path, knob: str) -> Finding:
    there = _nearest(folder)
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return judge(check, f"{folder} can be written")
    why = "may not be written by this user" if there.is_dir() else "is no folder"
    return judge(check, f"{folder} cannot be written: {there} {why}", f"choose a folder of your own with {knob}")


def _disk(settings: Settings) -> Finding:
    places = dict.fromkeys((_nearest(settings.data_dir), _nearest(settings.storage_path)))
    free = {place: shutil.disk_usage(place).free / 2**30 for place in places}
    least = min(free, key=lambda place: free[place])
    remedy = f"free some: checkpoints need room, at least {_MIN_FREE_GIB:g} GiB"
    return judge("disk", f"{free[least]:.1f} GiB free under {least}", remedy * (free[least] < _MIN_FREE_GIB))


def _data_roots(roots: tuple[Path, ...]) -> Finding:
    missing = [str(root) for root in roots if not root.is_dir()]
    if missing:
        remedy = "make them, or correct SYNCBN_DATA_ROOTS: absolute paths with colons between"
        return judge("data roots", f"no folders: {', '.join(missing)}", remedy)
    return judge("data roots", f"jobs may read from {', '.join(map(str, roots)) or 'no folder at all'}")


def _secrets(folder: Path) -> Finding:
    check = "webhook secrets"
    if not folder.is_dir():
        return judge(check, f"{folder} is no folder", "make it, or correct SYNCBN_SECRETS_DIR")
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        return judge(check, f"{folder} cannot be read: {error.strerror}", "let the service's user read it")
    if folder.stat().st_mode & 0o002:
        return judge(check, f"everyone may put files into {folder}", f"chmod 0700 {folder}")
    remedies = []
    for path in files:
        try:
            SecretFiles(folder).read(path.name)
        except SecretUnreadable as error:
            remedies.append(f"{path.name}: {error}")
    return judge(check, f"{len(files)} in {folder}, {len(remedies)} of them cannot be used", *remedies)


def _nearest(folder: Path) -> Path:
    """The folder, or what there is of the way to it."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
