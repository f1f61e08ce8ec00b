"""API keys over HTTP, for admins. A key is told once, where it is made, and nowhere again."""

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Body, Depends, Query, Request, Response

from service.api.auth import require_json, require_role
from service.api.items import Items
from service.api.parts import Store
from service.api.principals import Limit
from service.api.problems import answers
from service.api.recording import say_what_for
from service.jobs import PRINCIPAL_NAME, ApiKey, KeyOrder, KeyRotation, NewApiKey, Role

router = APIRouter(
    prefix="/v1/api-keys",
    tags=["principals"],
    dependencies=[require_role(Role.ADMIN)],
    responses=answers(400, 401, 503),
)

_NO_ROTATION = KeyRotation()


@router.get("", summary="List keys", responses=answers(422))
def list_keys(
    store: Store,
    limit: Limit = 50,
    after: Annotated[str, Query(max_length=64, description="Only ids that come after this one.")] = "",
    principal: Annotated[PRINCIPAL_NAME | None, Query(description="Only this principal's keys.")] = None,
) -> Items[ApiKey]:
    """Keys without their secrets, oldest first, ended ones too."""
    return Items[ApiKey](items=tuple(store.keys.page(limit, after, principal)))


@router.post(
    "",
    status_code=201,
    summary="Make a key",
    dependencies=[Depends(require_json)],
    responses=answers(413, 415, 422),
)
def make_key(order: KeyOrder, request: Request, store: Store, response: Response) -> NewApiKey:
    """A new key for a principal. Keep the answer's `key`: it is told this once."""
    say_what_for(request, order.model_dump_json())
    life = None if order.expires_in_s is None else timedelta(seconds=order.expires_in_s)
    return _told_once(store.keys.make(order.principal, life), response)


@router.get("/{key_id}", summary="Show a key", responses=answers(404))
def show_key(key_id: str, store: Store) -> ApiKey:
    """What is known of a key, but not the key."""
    return store.keys.get(key_id)


@router.post("/{key_id}:revoke", summary="Revoke a key", responses=answers(404))
def revoke_key(key_id: str, store: Store) -> ApiKey:
    """Let the key open nothing from now on; revoking it again changes nothing."""
    return store.keys.revoke(key_id)


@router.post(
    "/{key_id}:rotate",
    status_code=201,
    summary="Replace a key",
    dependencies=[Depends(require_json)],
    responses=answers(404, 409, 413, 415, 422),
)
def rotate_key(
    key_id: str,
    request: Request,
    store: Store,
    response: Response,
    rotation: Annotated[KeyRotation, Body()] = _NO_ROTATION,
) -> NewApiKey:
    """A new key for the same principal and as long; the old one ends at once, or after `grace_s`."""
    say_what_for(request, f"replaces {key_id}, {rotation.model_dump_json()}")
    return _told_once(store.keys.rotate(key_id, timedelta(seconds=rotation.grace_s)), response)


def _told_once(made: NewApiKey, response: Response) -> NewApiKey:
    response.headers["Location"] = f"/v1/api-keys/{made.id}"
    response.headers["Cache-Control"] = "no-store"
    return made
