"""Webhooks over HTTP: where the service tells of jobs' events by itself."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from service.api.auth import Asker, require_json, require_role, visible_owner
from service.api.items import Items
from service.api.parts import PartsOf, Store
from service.api.principals import Limit
from service.api.problems import answers
from service.api.recording import say_what_for
from service.errors import InvalidRequest, NotFound
from service.jobs import Role, Webhook, WebhookDelivery, WebhookOrder

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"], responses=answers(400, 401, 503))

_SUBMITTERS = [require_role(Role.SUBMITTER)]


async def _own_hook(hook_id: str, asker: Asker, store: Store) -> Webhook:
    hook = await run_in_threadpool(store.webhooks.get, hook_id)
    if visible_owner(asker) not in (None, hook.owner):
        raise NotFound(f"there is no webhook {hook_id}")  # the same words as for one that does not exist
    return hook


OwnHook = Annotated[Webhook, Depends(_own_hook)]
"""The webhook named in the path; there is a 404 where there is none, or another principal's and no admin asks."""


@router.get("", summary="List webhooks", responses=answers(422))
def list_webhooks(
    asker: Asker,
    store: Store,
    limit: Limit = 50,
    after: Annotated[str, Query(max_length=64, description="Only ids that come after this one.")] = "",
) -> Items[Webhook]:
    """Webhooks, oldest first; everyone's for an admin, else the own ones."""
    return Items[Webhook](items=tuple(store.webhooks.page(limit, after, visible_owner(asker))))


@router.post(
    "",
    status_code=201,
    summary="Make a webhook",
    dependencies=[Depends(require_json), *_SUBMITTERS],
    responses=answers(413, 415, 422),
)
async def make_webhook(
    order: WebhookOrder, asker: Asker, request: Request, parts: PartsOf, response: Response
) -> Webhook:
    """Have every event of the own jobs, of the types in `events`, posted to `url` from now on, signed.

    Changes of state are always told. `secret` names a secret that lies with the service.
    """
    if problems := await parts.hooks.problems(order, asker):
        raise InvalidRequest(problems)
    whose = "everyone's" if order.all else "own"
    # Not before the secret's name is known to be one: somebody may have sent the secret itself.
    say_what_for(request, f"{whose} jobs to {order.url.host}, signed with {order.secret}")
    hook = await run_in_threadpool(parts.store.webhooks.make, order, asker.name)
    response.headers["Location"] = f"/v1/webhooks/{hook.id}"
    return hook


@router.get("/{hook_id}", summary="Show a webhook", responses=answers(404))
def show_webhook(hook: OwnHook) -> Webhook:
    """Where it leads, what it is told of, and whether it is."""
    return hook


@router.delete(
    "/{hook_id}", status_code=204, summary="Remove a webhook", dependencies=_SUBMITTERS, responses=answers(404)
)
def remove_webhook(hook: OwnHook, store: Store) -> None:
    """Tell it nothing any more, not even what waits."""
    store.webhooks.remove(hook.id)


@router.post("/{hook_id}:test", summary="Try a webhook", dependencies=_SUBMITTERS, responses=answers(404))
async def try_webhook(hook: OwnHook, parts: PartsOf) -> WebhookDelivery:
    """What came of a message of type `test`, sent now; `error` is null if it was delivered.

    Success lets whatever waits be told at once, and wakes a webhook that was failing.
    """
    delivery = await parts.hooks.trial(hook)
    await run_in_threadpool(parts.store.webhooks.record_test, hook.id, delivery)
    return delivery


@router.get("/{hook_id}/deliveries", summary="List deliveries", responses=answers(404, 422))
def list_deliveries(
    hook: OwnHook, store: Store, limit: Annotated[int, Query(ge=1, le=100)] = 50
) -> Items[WebhookDelivery]:
    """The last tries, newest first; 100 are kept."""
    return Items[WebhookDelivery](items=tuple(store.webhooks.deliveries(hook.id, limit)))
