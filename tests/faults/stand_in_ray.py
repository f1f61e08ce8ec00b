"""A cluster for the soak: answers the service as Ray's job server does, and runs each attempt in threads of its own.

The runners are real senders of telemetry; only training is left out: a step is a short wait, its loss a number that is
known in advance. So whatever the service has stored in the end can be compared with what must be there.
"""

import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from service.cluster.ingest_sender import IngestSender
from service.cluster.outbox import Record
from service.jobs import (
    AttemptEnded,
    CheckpointSaved,
    Control,
    LaunchRequest,
    LogLine,
    Outcome,
    TelemetryEvent,
)
from tests.service.store.telling import started, step

_STEP_S = 0.02
_SHARE_LOST = 0.15
_DELIVERY_S = 300.0


def loss_of(rank: int, number: int) -> float:
    return (rank + 1) / number


class StandInRay:
    """Attempts by name, each with the word that Ray would have for it; `beside_others` must stay empty.

    Of the first attempts ``share_lost`` end without a word.
    """

    def __init__(self, spool: Path, chance: random.Random, share_lost: float) -> None:
        self.beside_others: list[str] = []
        self.launched: list[str] = []
        self._share_lost = share_lost
        self._spool = spool
        self._chance = chance
        self._lock = threading.Lock()
        self._status: dict[str, str] = {}
        self._stops: dict[str, threading.Event] = {}
        self._saved: dict[str, int] = {}
        self._threads: list[threading.Thread] = []

    def submit(self, request: LaunchRequest, token: str) -> bool:
        """Start the attempt's runner; False if there is an attempt of that name already."""
        name = request.attempt_id
        with self._lock:
            if name in self._status:
                return False
            running = [each for each, word in self._status.items() if word == "RUNNING"]
            self.beside_others += [f"{name} beside {each}" for each in running if each.startswith(request.job_id)]
            self._status[name] = "RUNNING"
            self.launched.append(name)
            self._stops[name] = threading.Event()
            lost = request.attempt == 1 and self._chance.random() < self._share_lost
            lost_at = self._chance.randrange(1, request.spec.max_steps or 1) if lost else None
        thread = threading.Thread(target=self._run, args=(request, token, lost_at), name=name)
        self._threads.append(thread)
        thread.start()
        return True

    def status(self, name: str) -> str | None:
        with self._lock:
            return self._status.get(name)

    def stop(self, name: str) -> None:
        with self._lock:
            if name in self._stops:
                self._stops[name].set()

    def close(self) -> None:
        """Wait for every runner; there is none that does not end."""
        for stop in self._stops.values():
            stop.set()
        for thread in self._threads:
            thread.join(_DELIVERY_S + 60)

    def _run(self, request: LaunchRequest, token: str, lost_at: int | None) -> None:
        name = request.attempt_id
        sender = IngestSender(str(request.ingest_url), name, token, self._spool / name)
        sender.start()
        word = self._train(request, sender, lost_at)
        if word is None:
            sender.hurry(0.0)
            sender.close(AttemptEnded(outcome=Outcome.FAILED), 0.0)  # which nobody hears any more
        else:
            sender.close(word, _DELIVERY_S)
        with self._lock:
            self._status[name] = "SUCCEEDED" if word and word.outcome is Outcome.SUCCEEDED else "FAILED"

    def _train(self, request: LaunchRequest, sender: IngestSender, lost_at: int | None) -> AttemptEnded | None:
        """The last word of the attempt; None of one that was lost."""
        ranks = range(request.spec.num_workers)
        total = request.spec.max_steps or 0
        first = self._saved.get(request.job_id, 0)
        for rank in ranks:
            _put(sender, rank, started(resumed_step=first, total_steps=total))
            _put(sender, rank, LogLine(text=f"attempt {request.attempt}"))
        for number in range(first + 1, total + 1):
            stop = self._stops[request.attempt_id].wait(_STEP_S)
            if number == lost_at:
                return None
            if sender.control is Control.ABORT:
                return AttemptEnded(outcome=Outcome.STOPPED, detail="stopped by the service")
            if stop or sender.control is Control.STOP:
                self._saved[request.job_id] = number - 1
                saved = CheckpointSaved(step=number - 1, path="/storage/step.pt", size_bytes=1, duration_s=0.0)
                _put(sender, 0, saved)
                return AttemptEnded(outcome=Outcome.STOPPED, checkpoint_step=number - 1)
            for rank in ranks:
                _put(sender, rank, step(number, loss=loss_of(rank, number), step_s=_STEP_S))
        return AttemptEnded(outcome=Outcome.SUCCEEDED)


def _put(sender: IngestSender, rank: int, event: TelemetryEvent) -> None:
    sender.put(rank, [Record(time.time(), event.model_dump_json())])


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.endswith("/stop"):
            self.server.ray.stop(self.path.split("/")[-2])
            self._answer(200, {"stopped": True})
            return
        variables = json.loads(body)["runtime_env"]["env_vars"]
        request = LaunchRequest.model_validate_json(variables["SYNCBN_RUN"])
        is_new = self.server.ray.submit(request, variables["SYNCBN_INGEST_TOKEN"])
        self._answer(200 if is_new else 500, {"submission_id": request.attempt_id})

    def do_GET(self) -> None:
        if self.path.startswith("/api/v0/nodes"):
            node = {"state": "ALIVE", "resources_total": {"CPU": 64.0, "memory": 2.0**36}}
            self._answer(200, {"data": {"result": {"result": [node]}}})
            return
        status = self.server.ray.status(self.path.split("/")[-1])
        found = {"status": status, "message": "", "driver_node_id": None}
        self._answer(404 if status is None else 200, found)

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet."""

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, ray: StandInRay, host: str) -> None:
        super().__init__((host, 0), _Handler)
        self.ray = ray

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A service that is killed in the middle of a connection is what this is for."""


@contextmanager
def standing_in(
    spool: Path, chance: random.Random, host: str = "127.0.0.1", share_lost: float = _SHARE_LOST
) -> Iterator[tuple[StandInRay, str]]:
    """A cluster and its address, until the end of the block."""
    ray = StandInRay(spool, chance, share_lost)
    with _Server(ray, host) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield ray, f"http://{host}:{server.server_port}"
        finally:
            ray.close()
            server.shutdown()
            thread.join(10)
