"""The API over a real store, with the few parts beside it under the test's control."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import SecretStr

from service.api import create_app
from service.api.rates import RateLimits
from service.errors import ClusterUnreachable, FieldProblem
from service.jobs import IngestBatch, Job, JobSpec, JobState, PrincipalTerms, Role, TelemetryEvent, attempt_id
from service.planner import Planner
from service.store import JobStore
from service.webhooks import AddressGuard, Desk, SecretFiles, Sender
from tests.service.store.telling import rank_batch, spec


@dataclass
class House:
    """An app, its store, and what the cluster beside it says."""

    store: JobStore
    max_workers: int = 4
    cluster_answers: bool = True
    parts: dict[str, str] = field(default_factory=lambda: {"store": "ok", "cluster": "ok"})
    limits: RateLimits | None = None
    storage: Path = Path("/nowhere")
    secrets: Path | None = None
    networks: tuple[IPv4Network | IPv6Network, ...] = ()

    def app(self, api_token: str | None = None, stopping: threading.Event | None = None) -> FastAPI:
        guard, secrets = AddressGuard(self.networks), SecretFiles(self.secrets)
        return create_app(
            self.store,
            check_placement=self._check_placement,
            storage=self.storage,
            plan=Planner().plan,
            readiness=lambda: self.parts,
            gauges=lambda: {"syncbn_cluster_up": float(self.cluster_answers)},
            hooks=Desk(guard, secrets, Sender(guard, secrets)),
            stopping=stopping or threading.Event(),
            api_token=None if api_token is None else SecretStr(api_token),
            limits=self.limits,
        )

    def client(self, api_token: str | None = None) -> TestClient:
        return TestClient(self.app(api_token), base_url="http://127.0.0.1", raise_server_exceptions=False)

    def key(self, name: str, role: Role) -> dict[str, str]:
        """The header with which a principal of this role shows a key of its own."""
        self.store.principals.put(name, PrincipalTerms(role=role))
        return {"Authorization": f"Bearer {self.store.keys.make(name).key}"}

    def running_job(self, *events: TelemetryEvent, wanted: JobSpec | None = None) -> tuple[Job, str]:
        """A job whose rank 0 has told ``events``, and its ingest token."""
        job, token = self.store.start_attempt(self.store.create(wanted or spec())[0])
        job = self.store.transition(job, JobState.RUNNING)
        self.tell(job, token, *events)
        return job, token

    def tell(self, job: Job, token: str, *events: TelemetryEvent, first_seq: int = 0) -> None:
        told = IngestBatch(batches=(rank_batch(events, 0, first_seq),))
        self.store.ingest(attempt_id(job.id, job.attempt), token, told)

    def _check_placement(self, wanted: JobSpec) -> Sequence[FieldProblem]:
        if not self.cluster_answers:
            raise ClusterUnreachable("no cluster answers")
        if wanted.num_workers <= self.max_workers:
            return []
        return [FieldProblem("/num_workers", "cluster_too_small", f"room for {self.max_workers}")]
