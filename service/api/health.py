"""Whether the service lives and can do its work, open to everyone; what it measures, for whoever has a key."""

from fastapi import APIRouter, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from service.api.auth import require_role
from service.api.parts import PartsOf
from service.api.problems import PLAIN_TEXT, answers
from service.jobs import Role, View

router = APIRouter(tags=["health"])


class Readiness(View):
    """``ready`` if every part is; ``parts`` names each with "ok" or what is wrong."""

    ready: bool
    parts: dict[str, str]


@router.get("/livez", summary="Is the process alive?")
async def livez() -> dict[str, str]:
    """Answer, which is all that is asked."""
    return {"status": "ok"}


@router.get(
    "/readyz",
    summary="Can it work?",
    responses={503: {"model": Readiness, "description": "Some part does not work"}},
)
def readyz(parts: PartsOf, response: Response) -> Readiness:
    """Tell of each part whether it works; 503 unless all do."""
    told = parts.readiness()
    ready = all(status == "ok" for status in told.values())
    response.status_code = 200 if ready else 503
    return Readiness(ready=ready, parts=told)


@router.get(
    "/metrics",
    summary="Measure the service",
    response_class=Response,
    dependencies=[require_role(Role.READER)],
    responses=PLAIN_TEXT | answers(400, 401, 403, 429, 503),
)
def read_metrics(parts: PartsOf) -> Response:
    """Counters and gauges in Prometheus's text format: requests, jobs, telemetry, streams, scheduler, process."""
    return Response(parts.metrics.text(), media_type=CONTENT_TYPE_LATEST)
