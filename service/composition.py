"""Joins the parts into one running service: the only place that knows them all."""

import asyncio
import os
import secrets
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from service.api import create_app
from service.api.patience import cut_off_slow_readers
from service.api.rates import RateLimits
from service.cluster.head import LocalRayHead
from service.cluster.job_server import RayJobServer
from service.cluster.launcher import RayLauncher
from service.confinement import data_problems
from service.errors import ClusterUnreachable, ServiceError, StoreUnavailable
from service.exposure import refuse_exposure
from service.housekeeping import Housekeeper
from service.lock import lock_data_folder
from service.memory import open_store, refuse_unshared_cluster, retention_of
from service.planner import Planner
from service.scheduler import Scheduler
from service.scheduler.farewell import let_attempts_leave, set_aside
from service.settings import Settings
from service.store import JobStore
from service.webhooks import AddressGuard, Desk, Dispatcher, SecretFiles, Sender

MIN_FREE_BYTES = 200 * 2**20
"""Below this much free disk the service calls itself not ready."""

_GRACEFUL_SHUTDOWN_S = 3
_HEAD_HEARTBEAT_S = 5.0
_FAREWELL_S = 10.0
"""How long Ctrl-C waits for the jobs of the local head to save and report; a second Ctrl-C waits no longer."""

_log = structlog.get_logger("service")


class PortTaken(ServiceError):
    """The address to listen on is in use."""

    code = "port_taken"
    title = "The port is taken"


def serve(settings: Settings, announce: Callable[[str], None] = lambda url: None) -> None:
    """Run the service until SIGINT or SIGTERM; ``announce`` gets its URL once it accepts connections.

    Holds the data folder's lock, listens, follows the cluster, and at the end stops the local Ray head where it
    keeps one: jobs that were running have saved by then, and go on from there at the next start.

    Raises: PortTaken, DataFolderInUse, StoreUnavailable; Exposed for settings that would open the service to others,
        NoSharedCluster for a shared database without a shared cluster.
    """
    stopping = threading.Event()
    with ExitStack() as stack:
        stack.enter_context(lock_data_folder(settings.data_dir))
        refuse_unshared_cluster(settings)
        store = open_store(settings)
        stack.callback(store.close)
        refuse_exposure(settings, keys_made=store.keys.any_made())
        listener = stack.enter_context(_listen(settings.host, settings.port, settings.send_timeout_s))
        url = _url_of(listener, "http" if settings.tls_cert is None else "https")
        launcher, head = _connect_cluster(settings)
        if head is not None:
            stack.callback(_stop_head, head, store)
            stack.enter_context(_thread("head-heartbeat", lambda: _keep_touching(head, stopping), stopping))
        settings.storage_path.mkdir(parents=True, exist_ok=True)
        holder = _holder(settings)
        scheduler = Scheduler(
            store,
            launcher,
            ingest_url=str(settings.public_url or url),
            storage=settings.storage_path,
            quota_of=store.principals.quota_of,
            holder=holder,
        )
        scheduling = stack.enter_context(_thread("scheduler", lambda: scheduler.run(stopping), stopping))
        if head is not None:
            stack.callback(_cut_start_short, head, scheduler, stopping)
        guard, secret_files = AddressGuard(settings.webhook_networks), SecretFiles(settings.secrets_dir)
        sender = Sender(guard, secret_files)
        dispatcher = Dispatcher(store, sender, holder=holder)
        stack.enter_context(_thread("webhooks", lambda: dispatcher.run(stopping), stopping))
        housekeeper = Housekeeper(
            store,
            retention_of(settings),
            settings.keep_audit_days,
            every_s=settings.forget_every_hours * 3600,
            holder=holder,
        )
        stack.enter_context(_thread("housekeeper", lambda: housekeeper.run(stopping), stopping))
        app = create_app(
            store,
            check_placement=lambda spec: [
                *scheduler.placement_problems(spec),
                *data_problems(spec, settings.readable_roots, must_exist=head is not None),
            ],
            storage=settings.storage_path,
            plan=Planner().plan,
            readiness=lambda: _readiness(store, scheduler, settings.data_dir),
            gauges=lambda: scheduler.gauges,
            hooks=Desk(guard, secret_files, sender),
            api_token=settings.api_token,
            limits=RateLimits(requests=settings.rate_limit, refusals=settings.refusal_limit),
            allowed_hosts=_allowed_hosts(settings),
            stopping=stopping,
        )
        announce(url)
        server = _Server(server_config(app, settings), stopping)
        if head is not None:
            server.before_closing = lambda: _say_farewell(store, launcher, scheduler, scheduling, server)
        server.run(sockets=[listener])


def _holder(settings: Settings) -> str:
    """Who holds the leases: on a database in the locked data folder whoever has the lock, at once."""
    if settings.database_url is not None:  # a name that no other service has, whatever its folder is called
        return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    return f"the service on {settings.data_dir.absolute()}"


def server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How the app is served: over TLS where there is a certificate, and believing no proxy that is not named."""
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_GRACEFUL_SHUTDOWN_S,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies,
    )


class _Server(uvicorn.Server):
    """Uvicorn that tells open streams to end before it waits for their connections.

    ``before_closing`` runs beside the requests that are still answered then.
    """

    def __init__(self, config: uvicorn.Config, stopping: threading.Event) -> None:
        super().__init__(config)
        self.before_closing: Callable[[], None] = lambda: None
        self._stopping = stopping

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._stopping.set()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(self.before_closing)
        await super().shutdown(sockets)


def _connect_cluster(settings: Settings) -> tuple[RayLauncher, LocalRayHead | None]:
    if settings.ray_address is not None:
        token = settings.ray_token.get_secret_value() if settings.ray_token else None
        server = RayJobServer(str(settings.ray_address), token)
        return RayLauncher(lambda: server), None
    head = LocalRayHead(settings.data_dir / "ray", settings.num_local_cpus)
    return RayLauncher(head.connect), head


def _stop_head(head: LocalRayHead, store: JobStore) -> None:
    try:
        set_aside(store)
    finally:
        head.stop()


def _say_farewell(
    store: JobStore, launcher: RayLauncher, scheduler: Scheduler, scheduling: threading.Thread, server: uvicorn.Server
) -> None:
    """Let the attempts on the local head save and report while the service still listens."""
    if scheduler.cluster_status != "ok":
        return  # the head is starting or gone: nothing runs on it
    scheduling.join(_FAREWELL_S)  # or it would take the attempts' ends for accidents
    try:
        let_attempts_leave(store, launcher, _FAREWELL_S, hurried=lambda: server.force_exit)
    except (ClusterUnreachable, StoreUnavailable) as error:
        _log.warning("leaving without waiting for jobs to save and report", error=str(error))


def _cut_start_short(head: LocalRayHead, scheduler: Scheduler, stopping: threading.Event) -> None:
    """Spare whoever presses Ctrl-C the wait for a head that is just starting: the scheduler's thread waits for it."""
    stopping.set()
    if scheduler.cluster_status != "ok":
        head.stop()


def _keep_touching(head: LocalRayHead, stopping: threading.Event) -> None:
    while not stopping.is_set():
        head.touch()
        stopping.wait(_HEAD_HEARTBEAT_S)


def _readiness(store: JobStore, scheduler: Scheduler, data_dir: Path) -> dict[str, str]:
    try:
        store.ping()
        store_status = "ok"
    except StoreUnavailable as error:
        store_status = str(error)
    free = shutil.disk_usage(data_dir).free
    disk_status = "ok" if free >= MIN_FREE_BYTES else f"only {free / 2**20:.0f} MiB free under {data_dir}"
    return {"store": store_status, "cluster": scheduler.cluster_status, "disk": disk_status}


def _allowed_hosts(settings: Settings) -> tuple[str, ...]:
    """Host headers to answer: loopback names alone keep a browser's rebound DNS name out."""
    names = {"127.0.0.1", "localhost", "[::1]"}
    if settings.public_url is not None and settings.public_url.host:
        names.add(settings.public_url.host)
    return tuple(sorted(names)) if settings.loopback else ("*",)


@contextmanager
def _listen(host: str, port: int, send_timeout_s: float) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named TCP, or asyncio would not set TCP_NODELAY on its connections: each answer would wait 40 ms for an ACK.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise PortTaken(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another with --port or SYNCBN_PORT"
            ) from None
        cut_off_slow_readers(listener, send_timeout_s)
        listener.listen(2048)
        yield listener


def _url_of(listener: socket.socket, scheme: str) -> str:
    host, port = listener.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104
    return f"{scheme}://{f'[{reachable}]' if ':' in reachable and reachable[0] != '[' else reachable}:{port}"


@contextmanager
def _thread(name: str, target: Callable[[], None], stopping: threading.Event) -> Iterator[threading.Thread]:
    """Run ``target`` beside the block; at the block's end ask it to stop and wait for it."""
    thread = threading.Thread(target=target, name=name)
    thread.start()
    try:
        yield thread
    finally:
        stopping.set()
        thread.join()
