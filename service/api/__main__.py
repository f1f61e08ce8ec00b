"""Prints the OpenAPI document, as it is checked in under ``docs/openapi.json``: ``python -m service.api``."""

import json
import sys
import tempfile
import threading
from pathlib import Path

from service.api import create_app
from service.errors import FieldProblem, ServiceError
from service.jobs import JobPlan, JobSpec, Principal, Webhook, WebhookDelivery, WebhookOrder
from service.store import JobStore


def document() -> str:
    """The document as JSON text. No request is answered meanwhile; the store is there because an app needs one."""
    with tempfile.TemporaryDirectory() as folder:
        store = JobStore.open(Path(folder) / "document.sqlite")
        app = create_app(
            store,
            storage=Path(folder),
            check_placement=lambda spec: [],
            plan=_plan,
            readiness=dict,
            gauges=dict,
            hooks=_NoHooks(),
            stopping=threading.Event(),
        )
        try:
            return json.dumps(app.openapi(), indent=1, sort_keys=True) + "\n"
        finally:
            store.close()


class _NoHooks:
    async def problems(self, order: WebhookOrder, asker: Principal) -> list[FieldProblem]:
        raise ServiceError(f"no webhooks here for {asker.name}")

    async def trial(self, hook: Webhook) -> WebhookDelivery:
        raise ServiceError(f"nobody here who tries {hook.id}")


def _plan(spec: JobSpec) -> JobPlan:
    raise ServiceError(f"no planner here for {spec.name}")


if __name__ == "__main__":
    sys.stdout.write(document())
