"""The cluster, and whether its workers find their way back to the service and to its storage."""

import shutil
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

from pydantic import HttpUrl

from service.doctor.finding import Finding, judge
from service.errors import ServiceError
from service.settings import Settings


def look_at_cluster(settings: Settings) -> Iterator[Finding]:
    """Each check of it."""
    if settings.ray_address is None:
        yield _local_head(settings)
        return
    yield _job_server(settings, settings.ray_address)
    if not _is_here(settings.ray_address):
        yield _way_back(settings)


def _local_head(settings: Settings) -> Finding:
    if (Path(sys.executable).parent / "ray").exists() or shutil.which("ray") is not None:
        return judge("cluster", f"a local Ray head with {settings.num_local_cpus} CPUs will be kept")
    return judge("cluster", "no ray command", "pip install 'syncbn[ray]'")


def _job_server(settings: Settings, address: HttpUrl) -> Finding:
    try:
        from service.cluster.job_server import RayJobServer
        from service.cluster.launcher import RayLauncher

        token = settings.ray_token.get_secret_value() if settings.ray_token else None
        with RayJobServer(str(address), token) as server:
            nodes = RayLauncher(lambda: server).capacity().nodes
    except (ImportError, ServiceError) as error:
        remedy = "check SYNCBN_RAY_ADDRESS (the job server, usually port 8265) and SYNCBN_RAY_TOKEN"
        return judge("cluster", str(error), remedy)
    cpus, gpus = sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)
    return judge("cluster", f"{len(nodes)} nodes with {cpus:g} CPUs and {gpus:g} GPUs")


def _way_back(settings: Settings) -> Finding:
    remedies = []
    if settings.public_url is None or _is_here(settings.public_url):
        remedies.append("workers on other machines would report to themselves: set SYNCBN_PUBLIC_URL to this service")
    if settings.storage is None:
        remedies.append("checkpoints would stay on the worker's machine: set SYNCBN_STORAGE to a folder that all share")
    url = settings.public_url or f"{settings.host}:{settings.port}"
    return judge("way back", f"workers report to {url} and keep checkpoints in {settings.storage_path}", *remedies)


def _is_here(url: HttpUrl) -> bool:
    """Whether the URL leads to whichever machine it is used on."""
    host = (url.host or "").strip("[]")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
