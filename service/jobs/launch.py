"""What the service hands to a cluster to start one attempt."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, HttpUrl

from service.jobs.identifiers import attempt_id
from service.jobs.spec import JobSpec


class LaunchRequest(BaseModel):
    """One attempt of one job. Holds no secret: the ingest token travels beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    job_id: str
    attempt: Annotated[int, Field(ge=1)]
    spec: JobSpec
    ingest_url: HttpUrl
    storage: str
    """Folder of the job, the same path on the service and on every worker: checkpoints go below it."""
    told_step: int | None = None
    """How far every rank of the job has told its steps. To go on from beyond would leave a hole in the series."""
    start_checkpoint: str | None = None
    """A checkpoint file of another job to begin from, where this job has none of its own yet."""

    @property
    def attempt_id(self) -> str:
        """The name of this attempt everywhere, Ray included."""
        return attempt_id(self.job_id, self.attempt)
