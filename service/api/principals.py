"""Principals over HTTP: who asks, and for admins who may use the service, as what, and how much at once."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, Response

from service.api.auth import WhoCalls, require_json, require_role
from service.api.items import Items
from service.api.parts import Store
from service.api.problems import Answers, answers
from service.api.recording import say_what_for
from service.jobs import PRINCIPAL_NAME, Caller, Principal, PrincipalTerms, Role

router = APIRouter(prefix="/v1", tags=["principals"], responses=answers(400, 401, 503))

_ADMINS = [require_role(Role.ADMIN)]
_CREATED: Answers = {201: {"model": Principal, "description": "It is new"}}

Name = Annotated[PRINCIPAL_NAME, Path(description="The principal's name.")]
Limit = Annotated[int, Query(ge=1, le=200)]


@router.get("/whoami", summary="Who am I?")
def whoami(caller: WhoCalls) -> Caller:
    """The principal that the service takes you for, and the stored key by which it does."""
    return caller


@router.get("/principals", summary="List principals", dependencies=_ADMINS, responses=answers(422))
def list_principals(
    store: Store,
    limit: Limit = 50,
    after: Annotated[str, Query(max_length=64, description="Only names that come after this one.")] = "",
) -> Items[Principal]:
    """Principals in order of their names."""
    return Items[Principal](items=tuple(store.principals.page(limit, after)))


@router.get("/principals/{name}", summary="Show a principal", dependencies=_ADMINS, responses=answers(404, 422))
def show_principal(name: Name, store: Store) -> Principal:
    """Its role and quota."""
    return store.principals.get(name)


@router.put(
    "/principals/{name}",
    summary="Make or change a principal",
    dependencies=[Depends(require_json), *_ADMINS],
    responses=_CREATED | answers(409, 413, 415, 422),
)
def put_principal(name: Name, terms: PrincipalTerms, request: Request, store: Store, response: Response) -> Principal:
    """Set the role and quota of a principal; they hold from its next request on."""
    say_what_for(request, terms.model_dump_json())
    principal, created = store.principals.put(name, terms)
    if created:
        response.status_code = 201
        response.headers["Location"] = f"/v1/principals/{name}"
    return principal
