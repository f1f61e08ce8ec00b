"""A real HTTP peer for runners: takes telemetry as the service's ingest route does, and remembers it."""

import json
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

from service.jobs import RUNNER, AttemptEnded, Control, IngestBatch, IngestReply, TelemetryEvent

_Event = TypeVar("_Event", bound=TelemetryEvent)


class Receiver:
    """What runners have posted.

    ``away`` makes it answer 503; else its answer carries ``control`` and ``checkpoint_requests``.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.url = ""
        self.control = Control.CONTINUE
        self.checkpoint_requests = 0
        self.away = False
        self.num_posts = 0
        self.num_refused = 0
        self.paths: set[str] = set()
        self.events: dict[int, list[TelemetryEvent]] = defaultdict(list)
        self.times: dict[int, list[float]] = defaultdict(list)
        self.duplicates = 0
        self.order: list[tuple[int, TelemetryEvent]] = []
        self._changed = threading.Condition()

    def of_type(self, kind: type[_Event], rank: int | None = None) -> list[_Event]:
        """All facts of one kind, of one rank or of all."""
        with self._changed:
            return [
                event
                for each, events in self.events.items()
                for event in events
                if isinstance(event, kind) and rank in (None, each)
            ]

    @property
    def ended(self) -> AttemptEnded | None:
        """The last word, once it is here."""
        found = self.of_type(AttemptEnded, RUNNER)
        return found[0] if found else None

    def wait_for(self, condition: Callable[[], Any], timeout_s: float) -> Any:
        """The condition's value as soon as it is true; AssertionError with what is known if that takes too long."""
        with self._changed:
            value = self._changed.wait_for(condition, timeout_s)
        if not value:
            counts = {rank: len(events) for rank, events in self.events.items()}
            raise AssertionError(f"not within {timeout_s} s; events by rank {counts}, ended {self.ended}")
        return value

    def take(self, path: str, authorization: str | None, body: bytes) -> tuple[int, bytes]:
        """Status and answer to one post."""
        with self._changed:
            self.num_posts += 1
            self.paths.add(path)
            if self.away:
                self.num_refused += 1
                self._changed.notify_all()
                return 503, b"{}"
            if authorization != f"Bearer {self.token}":
                return 401, b"{}"
            for batch in IngestBatch.model_validate_json(body).batches:
                expected = len(self.events[batch.rank])
                assert batch.first_seq <= expected, f"rank {batch.rank}: hole from {expected} to {batch.first_seq}"
                new = expected - batch.first_seq
                self.duplicates += min(new, len(batch.events))
                self.events[batch.rank].extend(batch.events[new:])
                self.times[batch.rank].extend(batch.times[new:])
                self.order.extend((batch.rank, event) for event in batch.events[new:])
            self._changed.notify_all()
            next_seq = {rank: len(events) for rank, events in self.events.items()}
            reply = IngestReply(control=self.control, next_seq=next_seq, checkpoint_requests=self.checkpoint_requests)
            return 200, reply.model_dump_json().encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            status, answer = self.server.receiver.take(self.path, self.headers["Authorization"], body)
        except (AssertionError, ValueError) as error:
            self.server.problems.append(str(error))
            status, answer = 422, json.dumps(str(error)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, receiver: Receiver) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.receiver = receiver
        self.problems: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A runner may be killed in the middle of a connection; anything else is a problem."""
        error = sys.exception()
        if not isinstance(error, ConnectionError):
            self.problems.append(repr(error))


@contextmanager
def receiving(token: str = "ingest-token") -> Iterator[Receiver]:
    """A receiver that listens until the end of the block; what it could not make sense of fails the test."""
    receiver = Receiver(token)
    with _Server(receiver) as server:
        receiver.url = f"http://127.0.0.1:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join(10)
    assert not server.problems
