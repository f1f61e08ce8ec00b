"""Puts the API together."""

import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from fastapi import Request, Response
from pydantic import SecretStr

from service.api import (
    api_keys,
    audit,
    bulk,
    health,
    ingest,
    jobs,
    lifecycle,
    logs,
    planning,
    principals,
    problems,
    reports,
    retry,
    stream,
    telemetry,
    webhooks,
)
from service.api.auth import require_role
from service.api.document import Api
from service.api.doorkeeper import Doorkeeper
from service.api.feed import Feed
from service.api.gate import Gate
from service.api.metrics import Metrics
from service.api.middleware import AllowedHosts, BodyLimit, RequestIds
from service.api.parts import Hooks, Parts, parts_of
from service.api.rates import RateLimits
from service.api.recording import Recording
from service.api.submission import WrongSpec
from service.errors import FieldProblem, InvalidRequest
from service.jobs import JobPlan, JobSpec, Role
from service.store import JobStore

MAX_BODY_BYTES = 8 * 2**20


def create_app(
    store: JobStore,
    *,
    check_placement: Callable[[JobSpec], Sequence[FieldProblem]],
    storage: Path,
    plan: Callable[[JobSpec], JobPlan],
    readiness: Callable[[], dict[str, str]],
    gauges: Callable[[], Mapping[str, float]],
    hooks: Hooks,
    stopping: threading.Event,
    api_token: SecretStr | None = None,
    limits: RateLimits | None = None,
    allowed_hosts: Sequence[str] = ("127.0.0.1", "localhost", "[::1]"),
) -> Api:
    """The API over ``store``.

    ``check_placement`` says why the cluster could never hold a job, ``plan`` what would become of it, ``readiness``
    the state of each part ("ok" or what is wrong), ``gauges`` what other parts measure of themselves; all are called
    in worker threads. ``hooks`` judges and tries webhooks. Every ``/v1`` request must show a stored key or
    ``api_token``, once there is either; an attempt's reports carry their own. Retries begin from files below
    ``storage`` alone. ``stopping`` ends all streams. A host of ``*`` allows any.
    """
    feed = Feed(store, stopping)
    metrics = Metrics(store.count_by_state, lambda: {**gauges(), "syncbn_open_streams": feed.num_readers})
    app = Api(
        telemetry={"meter_provider": metrics.meter_provider},
        title="syncbn",
        version=version("syncbn"),
        summary="Trains BatchNorm networks on many workers as if they were one.",
        # The interactive pages load their scripts from elsewhere; the document itself is at /openapi.json.
        docs_url=None,
        redoc_url=None,
    )
    app.state.parts = Parts(store, check_placement, storage, plan, readiness, hooks, feed, metrics, stopping)
    problems.install(app)
    app.add_exception_handler(WrongSpec, _refuse_spec)
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)
    app.add_middleware(Gate, doorkeeper=Doorkeeper(store, api_token), limits=limits or RateLimits())
    app.add_middleware(Recording, store=store)
    app.add_middleware(AllowedHosts, allowed=allowed_hosts)
    app.add_middleware(RequestIds)
    for module in (
        planning,
        reports,
        jobs,
        bulk,
        lifecycle,
        retry,
        telemetry,
        logs,
        stream,
        principals,
        api_keys,
        audit,
        webhooks,
    ):
        app.include_router(module.router, dependencies=[require_role(Role.READER)])
    app.include_router(ingest.router)
    app.include_router(health.router)
    return app


def _refuse_spec(request: Request, error: Exception) -> Response:
    assert isinstance(error, WrongSpec)
    wrong = error.problems(parts_of(request).check_placement)
    return problems.from_error(request, InvalidRequest(wrong))
