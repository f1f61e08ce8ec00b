"""Whether the service lives, and whether it can do its work. Open to everyone, tells no secrets."""

from fastapi import APIRouter, Response

from service.api.parts import PartsOf
from service.jobs import View

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
