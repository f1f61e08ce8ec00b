"""A reader that takes nothing: its connection ends in bounded time, nothing piles up for it, and nothing is lost."""

import json
import re
import socket
import time
import tracemalloc
from collections.abc import Callable
from urllib.parse import urlsplit

from service.jobs import JobState
from tests.service.api.house import House
from tests.service.api.live import listening
from tests.service.api.test_stream import following
from tests.service.store.telling import drift, spec

_LAYERS = {f"layer{number}": 0.1 for number in range(300)}


def _wait_until(holds: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_reader_that_takes_nothing_is_cut_off_and_goes_on_without_loss(house: House) -> None:
    job, token = house.running_job(wanted=spec())
    for first in range(0, 150, 50):
        house.tell(job, token, *(drift(n, **_LAYERS) for n in range(first, first + 50)), first_seq=first)
    history_bytes = sum(len(json.dumps(event.body)) for event in house.store.events(job.id))
    assert history_bytes > 12 * 2**20  # far more than the kernel keeps for a connection
    app = house.app()
    feed = app.state.parts.feed
    with listening(app, send_timeout_s=1.0) as url, socket.socket() as idle:
        idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        idle.settimeout(30)
        idle.connect((urlsplit(url).hostname, urlsplit(url).port))
        tracemalloc.start()
        try:
            began = time.monotonic()
            idle.sendall(f"GET /v1/jobs/{job.id}/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            _wait_until(lambda: feed.num_readers == 1)
            _wait_until(lambda: feed.num_readers == 0)
            took_s = time.monotonic() - began
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert took_s < 20  # 1 s and what a busy machine adds; without the limit it would be for ever
        assert peak_bytes < history_bytes / 3
        house.store.transition(house.store.get(job.id), JobState.FAILED)
        seen = len(re.findall(rb"^event: event$", _rest(idle), re.MULTILINE)) - 1  # the last may be cut in two
        assert 0 <= seen < 154
        with following(f"{url}/v1/jobs/{job.id}/stream", **{"Last-Event-ID": str(seen)}) as messages:
            seqs = [int(message.id) for message in messages if message.event == "event"]
    assert seqs == list(range(seen + 1, 155))


def _rest(idle: socket.socket) -> bytes:
    """What the kernel still holds for the reader."""
    told = b""
    try:
        while more := idle.recv(2**16):
            told += more
    except ConnectionResetError:
        pass
    return told
