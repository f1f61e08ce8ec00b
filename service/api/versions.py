"""A job's version as an ETag, and changes that are meant for one version alone.

The version counts changes of state, of priority and of the number of workers, and cancellations that were forced; what
a job reports while it runs does not count, so that whoever looks, decides and changes is not refused for a step that
was taken meanwhile.
"""

import re
from typing import Annotated

from fastapi import Header, Response

from service.errors import FieldProblem, InvalidRequest, PreconditionFailed
from service.jobs import Job

IfMatch = Annotated[
    str | None,
    Header(description='Change the job only while it has this ETag, such as `"3"`; several may be named, or `*`.'),
]

_TAG = re.compile(r'(W/)?"([^"]*)"')


def tell_version(response: Response, job: Job) -> Job:
    """The job, with its version in the answer's ``ETag``."""
    response.headers["ETag"] = _etag(job)
    return job


def require_match(job: Job, if_match: str | None) -> None:
    """Return if the job has the version that the request is meant for, if it names any.

    Raises: PreconditionFailed; InvalidRequest for a header that is no list of tags. A weak tag matches nothing
    (RFC 9110, section 13.1.1).
    """
    if if_match is None or if_match.strip() == "*":
        return
    tags = [tag.strip() for tag in if_match.split(",")]
    if not all(_TAG.fullmatch(tag) for tag in tags):
        text = 'is not a list of ETags; take one from a former answer with its quotes, such as "3"'
        raise InvalidRequest([FieldProblem("/If-Match", "etag_invalid", text)])
    if _etag(job) not in tags:
        raise PreconditionFailed(
            f"{job.id} is {job.state}, version {job.version}, not {if_match}; look at it again, then decide"
        )


def _etag(job: Job) -> str:
    return f'"{job.version}"'
