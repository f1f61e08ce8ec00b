"""Brings an attempt's telemetry home: batches over HTTP in the background, kept while the service is away."""

import json
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
from pydantic import ValidationError

from service.cluster.outbox import Outbox, Record
from service.jobs import RUNNER, AttemptEnded, Control, IngestReply, TelemetryEvent

UNDELIVERED = "undelivered.jsonl"

_FLUSH_S = 0.5
_HEARTBEAT_S = 1.0
_MAX_EVENTS = 512
_MAX_BYTES = 1_000_000
_FIRST_BACKOFF_S = 0.25
_LAST_BACKOFF_S = 5.0
_REFUSALS = frozenset({400, 401, 403, 404, 405, 409, 410, 413, 415, 422})


class IngestSender:
    """Posts what is `put` to the service's ingest route for ``attempt_id``, in order for each rank.

    A thread posts up to 512 events at a time, an empty batch each second as heartbeat. While the service is away it
    tries again at growing intervals of up to 5 s; what does not fit in memory waits in ``spool_dir``.
    """

    def __init__(
        self, ingest_url: str, attempt_id: str, token: str, spool_dir: Path, *, refusal_grace_s: float = 30.0
    ) -> None:
        self._url = f"{ingest_url.rstrip('/')}/v1/attempts/{attempt_id}/telemetry"
        self._spool_dir = spool_dir
        self._refusal_grace_s = refusal_grace_s
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            timeout=httpx2.Timeout(10.0, connect=3.0),
            trust_env=urlsplit(ingest_url).hostname not in ("127.0.0.1", "localhost", "::1"),
        )
        self._lock = threading.Lock()
        self._outboxes: dict[int, Outbox] = {}
        self._closing = threading.Event()
        self._last_word: AttemptEnded | None = None
        self._delivered: bool | None = None
        self._deadline = float("inf")
        self._control = Control.CONTINUE
        self._checkpoint_requests = 0
        self._refused_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="ingest", daemon=True)

    @property
    def control(self) -> Control:
        """What the service wanted in its last answer; ABORT, too, once it has refused us for ``refusal_grace_s``."""
        return self._control

    @property
    def checkpoint_requests(self) -> int:
        """How often a checkpoint has been asked for over the job's life, as of the service's last answer."""
        return self._checkpoint_requests

    def start(self) -> None:
        """Begin posting; the first heartbeat goes at once."""
        self._thread.start()

    def put(self, rank: int, records: Iterable[Record]) -> None:
        """Hand over facts of one rank in the order they happened. Returns at once.

        Raises: OSError if the service is away, the memory is full, and the disk takes no more.
        """
        with self._lock:
            if rank not in self._outboxes:
                self._outboxes[rank] = Outbox(rank, self._spool_dir / f"spool-rank-{rank}.txt")
            self._outboxes[rank].put(list(records))

    def tell(self, event: TelemetryEvent, rank: int = RUNNER) -> None:
        """Put one fact that happens now."""
        self.put(rank, [Record(time.time(), event.model_dump_json())])

    def close(self, last_word: AttemptEnded, timeout_s: float) -> bool:
        """Deliver the rest and then, when all else is taken, ``last_word``; whether that came to pass in ``timeout_s``.

        What did not is left in ``spool_dir / "undelivered.jsonl"``: each line is the body of one post. Only the
        first call does anything; later ones give its answer.
        """
        if self._delivered is not None:
            return self._delivered
        self._last_word = last_word
        self.hurry(timeout_s)
        self._closing.set()
        while self._thread.is_alive():
            self._thread.join(0.2)  # in slices, so that a signal's handler may call `hurry` meanwhile
        self._put_last_word()
        with self._lock:
            self._delivered = not self._num_pending()
            if not self._delivered:
                self._leave_on_disk()
            for outbox in self._outboxes.values():
                outbox.close()
        self._client.close()
        return self._delivered

    def hurry(self, timeout_s: float) -> None:
        """Let `close`, now or later, give up at most ``timeout_s`` from now. A signal's handler may call this."""
        self._deadline = min(self._deadline, time.monotonic() + timeout_s)

    def _run(self) -> None:
        backoff = _FIRST_BACKOFF_S
        last_post = float("-inf")
        while not (self._closing.is_set() and (self._all_said() or time.monotonic() > self._deadline)):
            body, num_events = self._next_body()
            if not num_events and time.monotonic() - last_post < _HEARTBEAT_S:
                self._rest(_FLUSH_S)
                continue
            num_taken = self._post(body)
            last_post = time.monotonic()
            if num_taken is None:
                self._rest(backoff)
                backoff = min(backoff * 2, _LAST_BACKOFF_S)
                continue
            backoff = _FIRST_BACKOFF_S
            if self._closing.is_set() and self._control is Control.ABORT and not num_taken:
                return  # an aborted attempt's words are not taken any more
            if not num_taken or not (self._closing.is_set() or num_events >= _MAX_EVENTS):
                self._rest(_FLUSH_S)

    def _rest(self, seconds: float) -> None:
        if self._closing.is_set():
            time.sleep(max(min(seconds, self._deadline - time.monotonic()), 0))
        else:
            self._closing.wait(seconds)

    def _all_said(self) -> bool:
        """Whether nothing is left to send. Once all else is taken the last word's turn comes."""
        with self._lock:
            if self._num_pending():
                return False
        return not self._put_last_word()

    def _put_last_word(self) -> bool:
        last_word, self._last_word = self._last_word, None
        if last_word is None:
            return False
        self.tell(last_word)
        return True

    def _num_pending(self) -> int:
        return sum(len(outbox) for outbox in self._outboxes.values())

    def _next_body(self) -> tuple[str, int]:
        """One IngestBatch as JSON, and how many events it holds: a fair share of each rank's."""
        batches: list[str] = []
        num_events = 0
        with self._lock:
            outboxes = sorted(self._outboxes.values(), key=lambda outbox: len(outbox), reverse=True)
            share = max(_MAX_EVENTS // max(sum(1 for outbox in outboxes if len(outbox)), 1), 1)
            for outbox in outboxes:
                records = outbox.head(share, _MAX_BYTES // max(len(outboxes), 1))
                if not records or num_events >= _MAX_EVENTS:
                    continue
                batches.append(_batch_json(outbox, records))
                num_events += len(records)
        return _body_json(batches), num_events

    def _post(self, body: str) -> int | None:
        """How many events the service has newly taken; None if it cannot be reached or will not listen."""
        try:
            answer = self._client.post(self._url, content=body)
        except httpx2.TransportError:
            return None
        if answer.status_code != httpx2.codes.OK:
            self._note_refusal(answer.status_code)
            return None
        try:
            reply = IngestReply.model_validate_json(answer.content)
        except ValidationError:
            return None  # something else answers at this address for now
        self._refused_since = None
        self._control = reply.control
        self._checkpoint_requests = reply.checkpoint_requests
        with self._lock:
            before = self._num_pending()
            for rank, next_seq in reply.next_seq.items():
                if rank in self._outboxes:
                    self._outboxes[rank].acknowledge(next_seq)
            return before - self._num_pending()

    def _note_refusal(self, status: int) -> None:
        """A refusal is believed when it lasts: a proxy may answer for a service that is being restarted."""
        if status not in _REFUSALS:
            return
        now = time.monotonic()
        self._refused_since = self._refused_since or now
        if now - self._refused_since >= self._refusal_grace_s:
            self._control = Control.ABORT

    def _leave_on_disk(self) -> None:
        try:
            self._spool_dir.mkdir(parents=True, exist_ok=True)
            with (self._spool_dir / UNDELIVERED).open("w") as file:
                for outbox in self._outboxes.values():
                    while records := outbox.head(_MAX_EVENTS, _MAX_BYTES):
                        file.write(_body_json([_batch_json(outbox, records)]) + "\n")
                        outbox.acknowledge(outbox.first_seq + len(records))
        except OSError:
            return  # neither the service nor the disk takes it: there is no third place


def _batch_json(outbox: Outbox, records: list[Record]) -> str:
    """A RankBatch, put together from JSON that the ranks made.

    Parsing each event only to write it again would cost more than all else the runner does.
    """
    times = json.dumps([record.time for record in records])
    events = ",".join(record.event for record in records)
    return f'{{"rank":{outbox.rank},"first_seq":{outbox.first_seq},"times":{times},"events":[{events}]}}'


def _body_json(batches: list[str]) -> str:
    return f'{{"batches":[{",".join(batches)}]}}'
