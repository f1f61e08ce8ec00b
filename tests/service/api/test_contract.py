"""The whole API against its own document: generated requests, right and wrong, and what may be answered to them."""

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from service.api import create_app
from service.errors import FieldProblem, InvalidRequest
from service.jobs import JobPlan, JobSpec, JobState, LogLine, attempt_id
from service.store import JobStore
from service.training.plan import Impossible, plan
from service.webhooks import AddressGuard, Desk, SecretFiles, Sender
from tests.service.api.house import House
from tests.service.store.telling import drift, evaluation, sample, started, step


def _plan(spec: JobSpec) -> JobPlan:
    """As the planner's process does it, in this one."""
    try:
        return plan(spec)
    except Impossible as error:
        raise InvalidRequest([FieldProblem(error.pointer, "cannot_be_planned", str(error))]) from error
    except (OSError, ValueError) as error:
        raise InvalidRequest([FieldProblem("/data", "cannot_be_planned", str(error))]) from error


def _app(store: JobStore, secrets: Path | None, stopping: threading.Event) -> FastAPI:
    guard, files = AddressGuard(), SecretFiles(secrets)
    return create_app(
        store,
        storage=Path("/nowhere"),
        check_placement=lambda spec: [],
        plan=_plan,
        readiness=lambda: {"store": "ok"},
        gauges=lambda: {},
        hooks=Desk(guard, files, Sender(guard, files)),
        stopping=stopping,
        allowed_hosts=("*",),
    )


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    store = JobStore.open(tmp_path_factory.mktemp("contract") / "jobs.sqlite")
    app = _app(store, None, threading.Event())
    # What a process loads only once, such as the digits, shall not make its first answer differ from its second.
    _plan(JobSpec(name="first", epochs=1))
    house = House(store)
    job, _ = house.running_job(
        started(), step(1), evaluation(1), drift(1, bn=0.1), sample(1, bn=1.0), LogLine(text="line")
    )
    store.transition(store.get(job.id), JobState.SUCCEEDED)
    loaded = schemathesis.openapi.from_asgi("/openapi.json", app)
    known = {"job_id": job.id, "attempt_id": attempt_id(job.id, 1), "name": "train/loss"}

    @loaded.hook
    def flatmap_path_parameters(context: Any, path_parameters: Any) -> Any:
        """Ids that nobody has lead nowhere: half of the time the ones that exist."""
        names = set(path_parameters or {})
        there = {name: known[name] for name in names if name in known and (name != "name" or "job_id" in names)}
        return st.sampled_from([path_parameters, {**(path_parameters or {}), **there}])

    yield loaded
    store.close()


class _Rebuilt:
    """An app that each story finds with nothing in it: what another left behind would change its answers."""

    def __init__(self, open_store: Callable[[], JobStore], secrets: Path, stopping: threading.Event) -> None:
        self._open_store, self._secrets, self._stopping = open_store, secrets, stopping
        self._store = open_store()
        self._app = _app(self._store, secrets, stopping)

    def rebuild(self) -> None:
        self.close()
        self._store = self._open_store()
        self._app = _app(self._store, self._secrets, self._stopping)

    def close(self) -> None:
        self._store.close()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)


_CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]

_PROFILE = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_answer_is_one_that_the_document_promises(schema: Any, mode: GenerationMode) -> None:
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 20
    failures = []
    for operation in operations:

        @_PROFILE
        @given(case=operation.as_strategy(generation_mode=mode))
        def answer(case: schemathesis.Case[Any]) -> None:
            case.call_and_validate(checks=_CHECKS)

        try:
            answer()
        except (Exception, BaseExceptionGroup) as error:
            failures.append(f"{operation.label}: {error}")
    assert not failures, "\n\n".join(failures)


def test_what_was_made_is_then_asked_for_as_the_documents_links_lead(tmp_path: Path) -> None:
    """Jobs and webhooks are made, and read, steered, retried, tried and removed after that in any order.

    Streams of jobs that nobody runs would not end, so the service is one that is just stopping. Keys are not made:
    the first of them would close the service to whoever shows none.
    """
    stopping = threading.Event()
    stopping.set()
    secret = tmp_path / "ci"
    secret.write_text("a secret of the tests")
    secret.chmod(0o600)
    numbers = itertools.count()
    house = _Rebuilt(lambda: JobStore.open(tmp_path / f"{next(numbers)}.sqlite"), tmp_path, stopping)
    answered: Counter[tuple[str, int]] = Counter()

    whole = schemathesis.openapi.from_asgi("/openapi.json", house)
    loaded = whole.include(path_regex="^/v1/(jobs|webhooks)")

    @loaded.hook
    def flatmap_body(context: Any, body: Any) -> Any:
        """The specs are right: of generated ones hardly any is, and then there would be no job."""
        return st.just({"name": "digits", "max_steps": 5} if context.operation.label == "POST /v1/jobs" else body)

    class Client(loaded.as_state_machine()):  # type: ignore[misc]
        def setup(self) -> None:
            house.rebuild()

        def validate_response(self, response: Any, case: Any, *_: Any, **__: Any) -> None:
            answered[case.operation.label, response.status_code] += 1
            case.validate_response(response, checks=_CHECKS)

    try:
        Client.run(settings=settings(_PROFILE, max_examples=40, stateful_step_count=10))
    finally:
        house.close()
    about_jobs = {label for label, status in answered if "{job_id}" in label and status < 400}
    assert len(about_jobs) >= 8, answered
