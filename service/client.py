"""Python client of the REST API: the same values as inside the service, and the same errors."""

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx2

from service.errors import FieldProblem, InvalidRequest, ServiceError
from service.jobs import (
    ComparedMetric,
    Drift,
    Job,
    JobEvent,
    JobPage,
    JobReport,
    JobSpec,
    JobState,
    LayerHistory,
    LogRecord,
    MetricSeries,
    PlannedJob,
    SideBySide,
    Topic,
    Webhook,
    WebhookDelivery,
    WebhookOrder,
)

_SILENCE_S = 45.0
"""A stream says something at least every 15 s; three times that without a word is a lost connection."""

_PLANNING_S = 150.0
"""The service gives a plan 60 s, and as long for those before it; then it says so itself."""

_TRIAL_S = 30.0
"""The service gives a webhook 10 s to answer, and as long to resolve its name; then it says so itself."""

_COMPARING_S = 120.0
"""The service judges each of up to 64 jobs anew."""

_WEBHOOKS = "/v1/webhooks"

_PAUSES_S = (0.1, 0.3, 1.0, 2.0)


class ServiceUnreachable(ServiceError):
    """Nothing answers at the service's address."""

    status = 503
    code = "service_unreachable"
    title = "The service cannot be reached"
    retryable = True


class Client:
    """Talks to one service; every method raises the `ServiceError` that the service answered with.

    ``timeout_s`` bounds each request; `stream` instead bounds the silence, and how long the service may be away.
    """

    def __init__(
        self, base_url: str = "http://127.0.0.1:8400", token: str | None = None, timeout_s: float = 10
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        # A proxy of the environment is for the world outside, rarely for a service on this machine or cluster.
        self._http = httpx2.Client(base_url=self._base_url, headers=headers, timeout=timeout_s, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def submit(self, spec: JobSpec, idempotency_key: str | None = None) -> Job:
        """Submit a job; asking again with the same key and spec returns the same job."""
        headers = {"Content-Type": "application/json"}
        if idempotency_key is not None:
            headers["Idempotency-Key"] = idempotency_key
        answer = self._ask("POST", "/v1/jobs", content=spec.model_dump_json(), headers=headers)
        return Job.model_validate_json(answer.content)

    def plan(self, spec: JobSpec) -> PlannedJob:
        """What would become of the job, and whether the cluster could hold it.

        Takes some seconds, whatever ``timeout_s`` is: the service builds the model, one plan at a time.
        """
        answer = self._ask(
            "POST",
            "/v1/jobs:plan",
            content=spec.model_dump_json(),
            headers={"Content-Type": "application/json"},
            timeout=_PLANNING_S,
        )
        return PlannedJob.model_validate_json(answer.content)

    def job(self, job_id: str) -> Job:
        """The job as it stands."""
        return Job.model_validate_json(self._ask("GET", _path(job_id)).content)

    def jobs(
        self,
        limit: int = 50,
        cursor: str | None = None,
        states: Collection[JobState] | None = None,
        name: str | None = None,
    ) -> JobPage:
        """A page of jobs, newest first; ``cursor`` is a former page's ``next_cursor``."""
        wanted = {"limit": limit, "cursor": cursor, "state": sorted(states) if states else None, "name": name}
        return JobPage.model_validate_json(self._ask("GET", "/v1/jobs", params=wanted).content)

    def cancel(self, job_id: str, checkpoint: bool = False) -> Job:
        """Cancel the job, which may save a checkpoint first; cancelling again changes nothing."""
        return self._steer(job_id, "cancel", params={"checkpoint": checkpoint or None})

    def pause(self, job_id: str) -> Job:
        """Let the job save a checkpoint and give its resources back; pausing again changes nothing."""
        return self._steer(job_id, "pause")

    def resume(self, job_id: str, num_workers: int | None = None) -> Job:
        """Queue a paused job again, if wanted with other workers; one that is not paused any more is left alone."""
        return self._steer(job_id, "resume", json={} if num_workers is None else {"num_workers": num_workers})

    def checkpoint(self, job_id: str) -> Job:
        """Ask a job that runs to save a checkpoint now; an event ``checkpoint`` tells when it has."""
        return self._steer(job_id, "checkpoint")

    def retry(self, job_id: str, from_checkpoint: bool | int | None = None, idempotency_key: str | None = None) -> Job:
        """A new job of one that is over: from its newest checkpoint, the beginning (False), or that of a step.

        By default from the newest checkpoint, if any, of a job that did not succeed, and else from the beginning.
        """
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        return self._steer(job_id, "retry", json={"from_checkpoint": from_checkpoint}, headers=headers)

    def set_priority(self, job_id: str, priority: int, version: int | None = None) -> Job:
        """Put the job before or behind others of its owner; with ``version``, only while it still has that one.

        Raises: PreconditionFailed where it has another.
        """
        headers = {} if version is None else {"If-Match": f'"{version}"'}
        answer = self._ask("PATCH", _path(job_id), json={"priority": priority}, headers=headers)
        return Job.model_validate_json(answer.content)

    def report(self, job_id: str) -> JobReport:
        """Whether the job converges, and whether its running statistics can be trusted."""
        return JobReport.model_validate_json(self._ask("GET", f"{_path(job_id)}/report").content)

    def metric_names(self, job_id: str) -> list[str]:
        """The metrics that the job has points of."""
        return [str(name) for name in self._items(f"{_path(job_id)}/metrics", {})]

    def metric(
        self,
        job_id: str,
        name: str,
        *,
        rank: int | None = None,
        first_step: int | None = None,
        last_step: int | None = None,
        max_points: int = 500,
    ) -> MetricSeries:
        """One metric over steps, of one rank or as the mean over ranks."""
        wanted = {"rank": rank, "first_step": first_step, "last_step": last_step, "max_points": max_points}
        answer = self._ask("GET", f"{_path(job_id)}/metrics/{quote(name)}", params=wanted)
        return MetricSeries.model_validate_json(answer.content)

    def drift(self, job_id: str, layer: str | None = None) -> list[Drift]:
        """Drift of the running statistics at each measured step, of all layers or one."""
        return [Drift.model_validate(item) for item in self._items(f"{_path(job_id)}/drift", {"layer": layer})]

    def events(
        self, job_id: str, after: int = 0, limit: int = 500, types: Collection[Topic] | None = None
    ) -> list[JobEvent]:
        """The job's events after number ``after``, of some types or of all."""
        wanted = {"after": after, "limit": limit, "types": sorted(types) if types else None}
        found = self._items(f"{_path(job_id)}/events", wanted)
        return [JobEvent.model_validate(item) for item in found]

    def logs(self, job_id: str, after: int = 0, limit: int = 500) -> list[LogRecord]:
        """The job's log lines after number ``after``."""
        found = self._items(f"{_path(job_id)}/logs", {"after": after, "limit": limit})
        return [LogRecord.model_validate(item) for item in found]

    def ready(self) -> dict[str, str]:
        """Each part of the service with "ok" or what is wrong with it."""
        answer = self._send("GET", "/readyz")
        told = _json_object(answer)
        if "parts" not in told:
            raise _error_of(answer)
        return {str(part): str(status) for part, status in told["parts"].items()}

    def stream(
        self, job_id: str, after: int = 0, patience_s: float = 60, types: Collection[Topic] | None = None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Follow the job until it is over, through lost connections and restarts of the service.

        Yields type and payload: each `JobEvent` after number ``after`` once and in order under its own type, or only
        those of some ``types``; ``progress`` with a `Progress`; last ``end`` with the `Job`. After ``reset`` all is
        told again, from its ``next_seq`` on: the service's history is not the one that the reader knew.

        Raises: ServiceUnreachable when the service has been away for ``patience_s``; at once if it never answered.
        """
        for message in self._follow(f"{_path(job_id)}/stream", after, patience_s, types):
            payload = json.loads(message.data)
            yield (payload["type"] if message.event == "event" else message.event), payload

    def follow_logs(self, job_id: str, after: int = 0, patience_s: float = 60) -> Iterator[LogRecord]:
        """Every line of the job's log after number ``after``, until the job is over; as `stream` does. Raises: Gone."""
        for message in self._follow(f"{_path(job_id)}/logs/stream", after, patience_s):
            if message.event == "log":
                yield LogRecord.model_validate_json(message.data)

    def make_webhook(self, order: WebhookOrder) -> Webhook:
        """Have events posted to the URL of ``order`` from now on, signed with a secret that lies with the service."""
        headers = {"Content-Type": "application/json"}
        answer = self._ask("POST", _WEBHOOKS, content=order.model_dump_json(), headers=headers)
        return Webhook.model_validate_json(answer.content)

    def webhooks(self, limit: int = 50, after: str = "") -> list[Webhook]:
        """Webhooks whose ids come after ``after``, oldest first; everyone's for an admin, else the own ones."""
        found = self._items(_WEBHOOKS, {"limit": limit, "after": after})
        return [Webhook.model_validate(item) for item in found]

    def webhook(self, hook_id: str) -> Webhook:
        """The webhook as it stands."""
        return Webhook.model_validate_json(self._ask("GET", _webhook_path(hook_id)).content)

    def deliveries(self, hook_id: str, limit: int = 50) -> list[WebhookDelivery]:
        """The last tries to tell the webhook something, newest first; 100 are kept."""
        found = self._items(f"{_webhook_path(hook_id)}/deliveries", {"limit": limit})
        return [WebhookDelivery.model_validate(item) for item in found]

    def try_webhook(self, hook_id: str) -> WebhookDelivery:
        """What came of a message of type ``test``, sent now; may take 10 s, whatever ``timeout_s`` is.

        Success lets whatever waits be told at once, and wakes a webhook that was failing.
        """
        answer = self._ask("POST", f"{_webhook_path(hook_id)}:test", timeout=_TRIAL_S)
        return WebhookDelivery.model_validate_json(answer.content)

    def remove_webhook(self, hook_id: str) -> None:
        """Tell it nothing any more, not even what waits."""
        self._ask("DELETE", _webhook_path(hook_id))

    def layers(
        self,
        job_id: str,
        *,
        layer: str = "*",
        metrics: Sequence[str] = (),
        first_step: int | None = None,
        last_step: int | None = None,
        max_points: int = 500,
    ) -> LayerHistory:
        """Numbers of the BatchNorm layers over steps, those that patterns such as ``drift/*`` name, or all."""
        wanted = {
            "layer": layer,
            "metric": list(metrics) or None,
            "first_step": first_step,
            "last_step": last_step,
            "max_points": max_points,
        }
        return LayerHistory.model_validate_json(self._ask("GET", f"{_path(job_id)}/bn", params=wanted).content)

    def compare(self, job_ids: Sequence[str], metric: ComparedMetric = ComparedMetric.ACCURACY) -> SideBySide:
        """2 to 64 jobs beside each other, and which of their settings did better over seeds.

        Takes a fraction of a second for each job, of long ones more, whatever ``timeout_s`` is.
        """
        wanted = {"job": list(job_ids), "metric": metric}
        answer = self._ask("GET", "/v1/jobs:compare", params=wanted, timeout=_COMPARING_S)
        return SideBySide.model_validate_json(answer.content)

    def _follow(
        self, path: str, seen: int, patience_s: float, types: Collection[Topic] | None = None
    ) -> Iterator[httpx2.ServerSentEvent]:
        """The messages of a stream, those with an id once and in order, ``end`` last."""
        params = {"types": sorted(types)} if types else {}
        answered, failures = False, 0
        deadline = time.monotonic() + patience_s
        while True:
            try:
                for message in self._messages(path, seen, params):
                    answered, failures = True, 0
                    deadline = time.monotonic() + patience_s
                    # A message without an id of its own has that of the one before.
                    seen = int(message.id or seen)
                    yield message
                    if message.event == "end":
                        return
            except ServiceError as error:
                if not (answered and error.retryable) or time.monotonic() > deadline:
                    raise
            time.sleep(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
            failures += 1

    def _messages(self, path: str, seen: int, params: Mapping[str, Sequence[str]]) -> Iterator[httpx2.ServerSentEvent]:
        """The messages of one connection; it may end before ``end`` comes."""
        timeout = httpx2.Timeout(self._timeout_s, read=_SILENCE_S)
        headers = {"Last-Event-ID": str(seen)}
        try:
            with self._http.stream("GET", path, params=params, headers=headers, timeout=timeout) as answer:
                if answer.is_error:
                    answer.read()
                    raise _error_of(answer)
                yield from httpx2.EventSource(answer)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error

    def _steer(self, job_id: str, verb: str, **request: Any) -> Job:
        return Job.model_validate_json(self._ask("POST", f"{_path(job_id)}:{verb}", **request).content)

    def _items(self, path: str, params: Mapping[str, Any]) -> list[Any]:
        return list(_json_object(self._ask("GET", path, params=params))["items"])

    def _ask(self, method: str, path: str, **request: Any) -> httpx2.Response:
        answer = self._send(method, path, **request)
        if answer.is_error:
            raise _error_of(answer)
        return answer

    def _send(self, method: str, path: str, **request: Any) -> httpx2.Response:
        if "params" in request:
            request["params"] = {name: value for name, value in request["params"].items() if value is not None}
        try:
            return self._http.request(method, path, **request)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx2.TransportError) -> ServiceUnreachable:
        if isinstance(error, httpx2.TimeoutException):
            return ServiceUnreachable(f"{self._base_url} does not answer in time; is it overloaded?")
        return ServiceUnreachable(
            f"no service answers at {self._base_url} ({error}); start one with `syncbn serve`, or set SYNCBN_URL"
        )


def _path(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _webhook_path(hook_id: str) -> str:
    return f"{_WEBHOOKS}/{quote(hook_id, safe='')}"


def _json_object(answer: httpx2.Response) -> dict[str, Any]:
    try:
        told = answer.json()
    except ValueError:
        told = None
    return told if isinstance(told, dict) else {}


def _error_of(answer: httpx2.Response) -> ServiceError:
    """The error that the service raised, rebuilt from its problem; one of an unknown code keeps what it says."""
    told = _json_object(answer)
    detail = str(told.get("detail", f"{answer.url} answered {answer.status_code}, which is no answer of this service"))
    code = told.get("code", "unknown_answer")
    if code == InvalidRequest.code:
        return InvalidRequest([FieldProblem(**problem) for problem in told.get("errors", ())])
    for kind in ServiceError.__subclasses__():
        if kind.code == code:
            return kind(detail)
    error = ServiceError(detail)
    error.status, error.code = answer.status_code, str(code)
    error.title = str(told.get("title", answer.reason_phrase))
    error.retryable = bool(told.get("retryable", answer.status_code >= 500))
    return error
