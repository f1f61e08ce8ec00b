"""Joins the parts into one running service: the only place that knows them all."""

import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import structlog
import uvicorn

from service.api import create_app
from service.cluster.head import LocalRayHead
from service.cluster.job_server import RayJobServer
from service.cluster.launcher import RayLauncher
from service.errors import FieldProblem, ServiceError, StoreUnavailable
from service.jobs import JobSpec, JobState, Reason
from service.lock import lock_data_folder
from service.planner import Planner
from service.scheduler import Scheduler
from service.settings import Settings
from service.store import JobStore

MIN_FREE_BYTES = 200 * 2**20
"""Below this much free disk the service calls itself not ready."""

_GRACEFUL_SHUTDOWN_S = 3
_HEAD_HEARTBEAT_S = 5.0

_log = structlog.get_logger("service")


class PortTaken(ServiceError):
    """The address to listen on is in use."""

    code = "port_taken"
    title = "The port is taken"


def serve(settings: Settings, announce: Callable[[str], None] = lambda url: None) -> None:
    """Run the service until SIGINT or SIGTERM; ``announce`` gets its URL once it accepts connections.

    Holds the data folder's lock, listens, follows the cluster, and at the end stops the local Ray head where it
    keeps one: jobs that were running then go on from their last checkpoint at the next start.

    Raises: PortTaken, DataFolderInUse, ServiceError for settings that would expose the service.
    """
    if not settings.loopback and settings.api_token is None:
        raise ServiceError(
            f"refusing to listen on {settings.host} without a token: anyone there could run jobs; "
            "set SYNCBN_API_TOKEN, or listen on 127.0.0.1"
        )
    stopping = threading.Event()
    with ExitStack() as stack:
        stack.enter_context(lock_data_folder(settings.data_dir))
        listener = stack.enter_context(_listen(settings.host, settings.port))
        url = _url_of(listener)
        store = JobStore.open(settings.database_path)
        stack.callback(store.close)
        launcher, head = _connect_cluster(settings)
        if head is not None:
            stack.callback(_stop_head, head, store)
            stack.enter_context(_thread("head-heartbeat", lambda: _keep_touching(head, stopping), stopping))
        settings.storage_path.mkdir(parents=True, exist_ok=True)
        scheduler = Scheduler(
            store, launcher, ingest_url=str(settings.public_url or url), storage=settings.storage_path
        )
        stack.enter_context(_thread("scheduler", lambda: scheduler.run(stopping), stopping))
        if head is not None:
            stack.callback(_cut_start_short, head, scheduler, stopping)
        app = create_app(
            store,
            check_placement=lambda spec: _placement_problems(spec, scheduler, local=head is not None),
            plan=Planner().plan,
            readiness=lambda: _readiness(store, scheduler, settings.data_dir),
            api_token=settings.api_token,
            allowed_hosts=_allowed_hosts(settings),
            stopping=stopping,
        )
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACEFUL_SHUTDOWN_S
        )
        announce(url)
        _Server(config, stopping).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Uvicorn that tells open streams to end before it waits for their connections."""

    def __init__(self, config: uvicorn.Config, stopping: threading.Event) -> None:
        super().__init__(config)
        self._stopping = stopping

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._stopping.set()
        super().handle_exit(sig, frame)


def _connect_cluster(settings: Settings) -> tuple[RayLauncher, LocalRayHead | None]:
    if settings.ray_address is not None:
        token = settings.ray_token.get_secret_value() if settings.ray_token else None
        server = RayJobServer(str(settings.ray_address), token)
        return RayLauncher(lambda: server), None
    head = LocalRayHead(settings.data_dir / "ray", settings.num_local_cpus)
    return RayLauncher(head.connect), head


def _stop_head(head: LocalRayHead, store: JobStore) -> None:
    """End the local head; jobs that ran on it wait for the next start instead of pretending to run."""
    detail = "the service was stopped and its local Ray head with it; goes on when the service is back"
    for job in store.unfinished():
        if job.state in (JobState.STARTING, JobState.RUNNING):
            store.transition(job, JobState.RECOVERING, reason=Reason.SERVICE_STOPPED, detail=detail)
    head.stop()


def _cut_start_short(head: LocalRayHead, scheduler: Scheduler, stopping: threading.Event) -> None:
    """Spare whoever presses Ctrl-C the wait for a head that is just starting: the scheduler's thread waits for it."""
    stopping.set()
    if scheduler.cluster_status != "ok":
        head.stop()


def _keep_touching(head: LocalRayHead, stopping: threading.Event) -> None:
    while not stopping.is_set():
        head.touch()
        stopping.wait(_HEAD_HEARTBEAT_S)


def _placement_problems(spec: JobSpec, scheduler: Scheduler, *, local: bool) -> Sequence[FieldProblem]:
    problems = list(scheduler.placement_problems(spec))
    scheme, _, path = spec.data.partition(":")
    if local and scheme == "idx" and not Path(path).exists():
        problems.append(FieldProblem("/data", "path_missing", f"{path} does not exist on this machine"))
    return problems


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
def _listen(host: str, port: int) -> Iterator[socket.socket]:
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
        listener.listen(2048)
        yield listener


def _url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104
    return f"http://{f'[{reachable}]' if ':' in reachable and reachable[0] != '[' else reachable}:{port}"


@contextmanager
def _thread(name: str, target: Callable[[], None], stopping: threading.Event) -> Iterator[None]:
    """Run ``target`` beside the block; at the block's end ask it to stop and wait for it."""
    thread = threading.Thread(target=target, name=name)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
