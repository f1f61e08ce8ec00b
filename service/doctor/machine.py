"""The machine: packages, exchange between processes, memory, names, and how many files may be open."""

import importlib
import resource
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from service.doctor.finding import Finding, judge

MIN_FILES = 1024
"""Files and connections that may be open at once: each stream that somebody follows is one."""

_MIN_SHARED_MEMORY_MIB = 100.0


def look_at_machine() -> Iterator[Finding]:
    """Each check of it."""
    yield _package("torch", "pip install torch")
    yield _package("ray", "pip install 'syncbn[ray]'")
    yield _package("sklearn", "pip install 'syncbn[data]' for builtin:digits")
    yield _gloo()
    yield _shared_memory()
    yield _host_name()
    yield _open_files()


def _package(name: str, remedy: str) -> Finding:
    try:
        version = getattr(importlib.import_module(name), "__version__", "present")
    except ImportError as error:
        return judge(f"package {name}", str(error), remedy)
    return judge(f"package {name}", f"{version} on Python {sys.version.split()[0]}")


def _gloo() -> Finding:
    check = "gloo, the exchange between CPU workers"
    try:
        import torch.distributed as dist
    except ImportError as error:
        return judge(check, str(error), "install torch first")
    if dist.is_available() and dist.is_gloo_available():
        return judge(check, "available")
    return judge(check, "missing", "install a torch build with distributed support")


def _shared_memory() -> Finding:
    path = Path("/dev/shm")  # noqa: S108 - asked for its size, never written
    if not path.exists():
        return judge("shared memory", "no /dev/shm; Ray uses files instead")
    size = shutil.disk_usage(path).free / 2**20
    remedy = "Ray keeps objects there; in a container start it with --shm-size=1g"
    return judge("shared memory", f"{size:.0f} MiB free in /dev/shm", remedy * (size < _MIN_SHARED_MEMORY_MIB))


def _host_name() -> Finding:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        remedy = "add the name to /etc/hosts, or set GLOO_SOCKET_IFNAME on the nodes"
        return judge("host name", f"{name} does not resolve: {error}", remedy)
    return judge("host name", f"{name} is {address}")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= MIN_FILES:
        return judge("open files", f"{'any number' if soft == resource.RLIM_INFINITY else soft} may be open at once")
    remedy = f"raise it to {MIN_FILES} or more: `ulimit -n`, LimitNOFILE= of systemd, or --ulimit of a container"
    return judge("open files", f"only {soft} may be open at once (the most that may be asked for: {hard})", remedy)
