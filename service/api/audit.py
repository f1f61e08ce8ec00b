"""The audit trail over HTTP, for admins, who can read it and nothing else."""

from typing import Annotated

from fastapi import APIRouter, Query

from service.api.auth import require_role
from service.api.parts import Store
from service.api.principals import Limit
from service.api.problems import answers
from service.jobs import PRINCIPAL_NAME, AuditPage, Role

router = APIRouter(prefix="/v1/audit", tags=["principals"], dependencies=[require_role(Role.ADMIN)])


@router.get("", summary="Read the audit trail", responses=answers(400, 401, 422, 503))
def read_audit(
    store: Store,
    limit: Limit = 50,
    cursor: Annotated[str | None, Query(max_length=200, description="`next_cursor` of the page before.")] = None,
    principal: Annotated[PRINCIPAL_NAME | None, Query(description="Only what this principal asked for.")] = None,
) -> AuditPage:
    """Every request that would change something, granted or refused, newest first."""
    return store.audit.page(limit, cursor, principal)
