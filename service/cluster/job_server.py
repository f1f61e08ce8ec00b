"""A client of Ray's job server: the few HTTP calls that the service makes of a cluster, each with a timeout."""

import json
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx2

from service.errors import ClusterUnreachable

_SUBMIT_TIMEOUT_S = 30.0  # the first job of a new head waits for the job agent
_LOG_BYTES = 64 * 1024


class RayJobServer:
    """Ray's dashboard and job server at ``address`` such as ``http://head:8265``. Safe to share between threads.

    Every method answers within ``timeout_s`` (submitting within 30 s) or raises `ClusterUnreachable`.
    """

    def __init__(self, address: str, token: str | None, timeout_s: float = 10.0) -> None:
        self.address = address.rstrip("/")
        self.token = token
        self._client = httpx2.Client(
            base_url=self.address,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx2.Timeout(timeout_s, connect=min(timeout_s, 5.0)),
            trust_env=not _is_loopback(
                self.address
            ),  # a proxy set for the internet cannot reach this machine's loopback
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connections."""
        self._client.close()

    def submit(self, submission_id: str, entrypoint: str, environment: Mapping[str, str]) -> None:
        """Start a job on the head node. An existing ``submission_id`` is adopted: nothing new starts."""
        body = {
            "submission_id": submission_id,
            "entrypoint": entrypoint,
            "entrypoint_num_cpus": 0,
            "runtime_env": {"env_vars": dict(environment)},
        }
        try:
            answer = self._request("POST", "/api/jobs/", json=body, timeout=_SUBMIT_TIMEOUT_S)
        except ClusterUnreachable:
            if self._exists(submission_id):
                return  # it did arrive, only the answer was lost
            raise
        # Ray answers a known submission id with a traceback and status 500 (or 400): only asking tells it from others.
        if answer.status_code != httpx2.codes.OK and not self._exists(submission_id):
            raise ClusterUnreachable(
                f"Ray at {self.address} did not take {submission_id} ({answer.status_code}): {_last_line(answer.text)}"
            )

    def status(self, submission_id: str) -> tuple[str, str] | None:
        """Ray's status word and message for a job; None if Ray has never heard of it."""
        answer = self._request("GET", f"/api/jobs/{submission_id}")
        if answer.status_code == httpx2.codes.NOT_FOUND:
            return None
        found = self._json(answer)
        return str(found["status"]), str(found.get("message") or "")

    def stop(self, submission_id: str) -> None:
        """Ask Ray to end a job. One that is over or unknown stays as it is."""
        answer = self._request("POST", f"/api/jobs/{submission_id}/stop")
        if answer.status_code != httpx2.codes.NOT_FOUND:
            self._json(answer)

    def log_tail(self, submission_id: str, max_lines: int = 200) -> str:
        """The last lines that a job's driver wrote, at most 64 KiB; "" if Ray has none."""
        found = self._request("GET", f"/api/jobs/{submission_id}")
        node = None if found.status_code == httpx2.codes.NOT_FOUND else self._json(found).get("driver_node_id")
        if node is None:
            return ""
        query = {"submission_id": submission_id, "node_id": node, "lines": str(max_lines), "filter_ansi_code": "true"}
        answer = self._request("GET", "/api/v0/logs/file", params=query)
        if answer.status_code != httpx2.codes.OK:
            return ""  # the job never came to write a line
        return answer.content[-_LOG_BYTES:].decode(errors="replace")

    def nodes(self) -> list[Mapping[str, float]]:
        """Total resources of each node that is alive: ``CPU`` and ``GPU`` in units, ``memory`` in bytes."""
        answer = self._json(self._request("GET", "/api/v0/nodes", params={"detail": "1", "limit": "10000"}))
        return [node["resources_total"] for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"]

    def _exists(self, submission_id: str) -> bool:
        return self.status(submission_id) is not None

    def _json(self, answer: httpx2.Response) -> Any:
        if answer.status_code != httpx2.codes.OK:
            raise ClusterUnreachable(
                f"Ray at {self.address} answered {answer.status_code} to {answer.request.method} "
                f"{answer.request.url.path}: {_last_line(answer.text)}"
            )
        try:
            return answer.json()
        except json.JSONDecodeError as error:
            raise ClusterUnreachable(
                f"what answers at {self.address} is not Ray's job server; give the dashboard's address, "
                "such as http://head:8265, in SYNCBN_RAY_ADDRESS"
            ) from error

    def _request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        try:
            answer = self._client.request(method, path, **options)
        except httpx2.TimeoutException as error:
            raise ClusterUnreachable(
                f"Ray at {self.address} did not answer {method} {path} in time; it is overloaded or stuck"
            ) from error
        except httpx2.TransportError as error:
            raise ClusterUnreachable(
                f"no connection to Ray at {self.address} ({error}); is the head up, and SYNCBN_RAY_ADDRESS right?"
            ) from error
        if answer.status_code in (httpx2.codes.UNAUTHORIZED, httpx2.codes.FORBIDDEN):
            given = "the token it was given" if self.token else "requests without a token"
            raise ClusterUnreachable(
                f"Ray at {self.address} refuses {given} ({answer.status_code}); "
                "set SYNCBN_RAY_TOKEN to the cluster's token"
            )
        return answer


def _is_loopback(address: str) -> bool:
    return urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip(" .")]
    return lines[-1][:500] if lines else "no reason given"
