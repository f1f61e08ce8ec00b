"""The doctor: looks at a machine for what most often keeps a service or a job from running."""

import importlib
import os
import shutil
import socket
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from service.client import Client
from service.errors import ServiceError
from service.exposure import exposure_problems
from service.settings import ClientSettings, Settings

_MIN_FREE_GIB = 1.0
_MIN_SHARED_MEMORY_MIB = 100.0


class Finding(BaseModel):
    """One check: what was found, and what to do where it is not ``ok``."""

    model_config = ConfigDict(frozen=True)

    check: str
    ok: bool
    found: str
    remedy: str = ""


def examine(settings: Settings, client_settings: ClientSettings) -> list[Finding]:
    """Make every check; none changes anything, and none takes longer than a few seconds."""
    return [
        _package("torch", "pip install torch"),
        _package("ray", "pip install 'syncbn[ray]'"),
        _package("sklearn", "pip install 'syncbn[data]' for builtin:digits"),
        _gloo(),
        _data_folder(settings.data_dir),
        _disk(settings.data_dir),
        _shared_memory(),
        _host_name(),
        _exposure(settings),
        _port_or_service(settings, client_settings),
        _cluster(settings),
    ]


def _package(name: str, remedy: str) -> Finding:
    try:
        version = getattr(importlib.import_module(name), "__version__", "present")
    except ImportError as error:
        return Finding(check=f"package {name}", ok=False, found=str(error), remedy=remedy)
    return Finding(check=f"package {name}", ok=True, found=f"{version} on Python {sys.version.split()[0]}")


def _gloo() -> Finding:
    check = "gloo, the exchange between CPU workers"
    try:
        import torch.distributed as dist
    except ImportError as error:
        return Finding(check=check, ok=False, found=str(error), remedy="install torch first")
    ok = dist.is_available() and dist.is_gloo_available()
    remedy = "" if ok else "install a torch build with distributed support"
    return Finding(check=check, ok=ok, found="available" if ok else "missing", remedy=remedy)


def _data_folder(folder: Path) -> Finding:
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    ok = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
    remedy = "" if ok else "choose a folder of your own with SYNCBN_DATA_DIR"
    return Finding(check="data folder", ok=ok, found=f"{folder} {'can' if ok else 'cannot'} be written", remedy=remedy)


def _disk(folder: Path) -> Finding:
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free / 2**30
    ok = free >= _MIN_FREE_GIB
    remedy = "" if ok else f"free some: checkpoints need room, at least {_MIN_FREE_GIB:g} GiB"
    return Finding(check="disk", ok=ok, found=f"{free:.1f} GiB free under {parent}", remedy=remedy)


def _shared_memory() -> Finding:
    path = Path("/dev/shm")  # noqa: S108 - asked for its size, never written
    if not path.exists():
        return Finding(check="shared memory", ok=True, found="no /dev/shm; Ray uses files instead")
    size = shutil.disk_usage(path).free / 2**20
    ok = size >= _MIN_SHARED_MEMORY_MIB
    remedy = "" if ok else "Ray keeps objects there; in a container start it with --shm-size=1g"
    return Finding(check="shared memory", ok=ok, found=f"{size:.0f} MiB free in /dev/shm", remedy=remedy)


def _host_name() -> Finding:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        remedy = "add the name to /etc/hosts, or set GLOO_SOCKET_IFNAME on the nodes"
        return Finding(check="host name", ok=False, found=f"{name} does not resolve: {error}", remedy=remedy)
    return Finding(check="host name", ok=True, found=f"{name} is {address}")


def _exposure(settings: Settings) -> Finding:
    problems = exposure_problems(settings, keys_made=False)  # not looked up: that could upgrade the database
    found = f"listens on {settings.host}" + ("" if settings.api_token is None else ", token needed")
    return Finding(check="exposure", ok=not problems, found=found, remedy="; ".join(problems))


def _port_or_service(settings: Settings, client_settings: ClientSettings) -> Finding:
    token = client_settings.api_token
    try:
        with Client(str(client_settings.url), token.get_secret_value() if token else None, timeout_s=3) as client:
            parts = client.ready()
    except ServiceError:
        return _port(settings)
    broken = {name: status for name, status in parts.items() if status != "ok"}
    found = f"answers at {client_settings.url}" + "".join(f"; {name}: {status}" for name, status in broken.items())
    remedy = "see what it names" if broken else ""
    return Finding(check="service", ok=not broken, found=found, remedy=remedy)


def _port(settings: Settings) -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            found = f"{settings.host}:{settings.port} cannot be used: {error.strerror}"
            return Finding(check="port", ok=False, found=found, remedy="choose another with SYNCBN_PORT")
    return Finding(check="port", ok=True, found=f"{settings.port} is free; no service runs yet")


def _cluster(settings: Settings) -> Finding:
    if settings.ray_address is None:
        ok = (Path(sys.executable).parent / "ray").exists() or shutil.which("ray") is not None
        remedy = "" if ok else "pip install 'syncbn[ray]'"
        found = f"a local Ray head with {settings.num_local_cpus} CPUs will be kept"
        return Finding(check="cluster", ok=ok, found=found if ok else "no ray command", remedy=remedy)
    try:
        from service.cluster.job_server import RayJobServer
        from service.cluster.launcher import RayLauncher

        token = settings.ray_token.get_secret_value() if settings.ray_token else None
        with RayJobServer(str(settings.ray_address), token) as server:
            nodes = RayLauncher(lambda: server).capacity().nodes
    except (ImportError, ServiceError) as error:
        remedy = "check SYNCBN_RAY_ADDRESS (the job server, usually port 8265) and SYNCBN_RAY_TOKEN"
        return Finding(check="cluster", ok=False, found=str(error), remedy=remedy)
    cpus, gpus = sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)
    return Finding(check="cluster", ok=True, found=f"{len(nodes)} nodes with {cpus:g} CPUs and {gpus:g} GPUs")
