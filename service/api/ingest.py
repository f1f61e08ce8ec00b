"""Where running attempts report. Their token opens this door and no other."""

from fastapi import APIRouter, Depends

from service.api.auth import AttemptToken, require_json
from service.api.parts import PartsOf
from service.api.problems import answers
from service.jobs import IngestBatch, IngestReply

router = APIRouter(prefix="/v1/attempts", tags=["ingest"])


@router.post(
    "/{attempt_id}/telemetry",
    summary="Report telemetry",
    dependencies=[Depends(require_json)],
    responses=answers(400, 401, 413, 415, 422, 429, 503),
)
def report_telemetry(attempt_id: str, token: AttemptToken, batch: IngestBatch, parts: PartsOf) -> IngestReply:
    """Take in what the ranks of an attempt told; the answer says whether to go on, and what is still missing."""
    reply = parts.store.ingest(attempt_id, token, batch)
    parts.metrics.num_facts.inc(sum(len(part.events) for part in batch.batches))
    return reply
