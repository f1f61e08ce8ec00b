"""Telemetry comes home over real HTTP, whatever the service does meanwhile."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

from service.cluster.ingest_sender import UNDELIVERED, IngestSender
from service.cluster.outbox import Record
from service.jobs import RUNNER, AttemptEnded, Control, LogLine, Outcome
from tests.service.cluster.receiver import Receiver, receiving

WORD = AttemptEnded(outcome=Outcome.SUCCEEDED)


def lines(first: int, count: int) -> list[Record]:
    return [Record(float(seq), LogLine(text=str(seq)).model_dump_json()) for seq in range(first, first + count)]


@contextmanager
def sending(receiver: Receiver, folder: Path, refusal_grace_s: float = 30.0) -> Iterator[IngestSender]:
    sender = IngestSender(receiver.url, "job_1-1", "ingest-token", folder, refusal_grace_s=refusal_grace_s)
    sender.start()
    try:
        yield sender
    finally:
        sender.hurry(0.0)
        sender.close(WORD, 0.0)


def wait_for_abort(sender: IngestSender) -> None:
    deadline = time.monotonic() + 10
    while sender.control is not Control.ABORT:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def texts(receiver: Receiver, rank: int) -> list[str]:
    return [event.text for event in receiver.of_type(LogLine, rank)]


def test_each_rank_arrives_whole_in_order_and_the_last_word_last(tmp_path: Path) -> None:
    with receiving() as receiver, sending(receiver, tmp_path) as sender:
        for first in range(0, 1500, 100):
            sender.put(0, lines(first, 100))
            sender.put(1, lines(first, 100))
        assert sender.close(WORD, 20)
        assert texts(receiver, 0) == texts(receiver, 1) == [str(seq) for seq in range(1500)]
        assert receiver.times[0] == [float(seq) for seq in range(1500)]
        assert receiver.order[-1] == (RUNNER, WORD)
        assert receiver.paths == {"/v1/attempts/job_1-1/telemetry"}
    assert list(tmp_path.iterdir()) == []


def test_an_idle_sender_beats(tmp_path: Path) -> None:
    with receiving() as receiver, sending(receiver, tmp_path):
        began = time.monotonic()
        receiver.wait_for(lambda: receiver.num_posts >= 3, 10)
        assert time.monotonic() - began >= 1.5


def test_nothing_is_lost_while_the_service_is_away(tmp_path: Path) -> None:
    with receiving() as receiver, sending(receiver, tmp_path) as sender:
        receiver.away = True
        sender.put(0, lines(0, 6000))
        receiver.wait_for(lambda: receiver.num_refused >= 2, 10)
        assert len((tmp_path / "spool-rank-0.txt").read_text().splitlines()) == 6000 - 4096
        receiver.away = False
        assert sender.close(WORD, 30)
        assert texts(receiver, 0) == [str(seq) for seq in range(6000)]
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_delivered_is_left_as_posts_that_can_be_made_later(tmp_path: Path) -> None:
    with receiving() as receiver:
        receiver.away = True
        with sending(receiver, tmp_path) as sender:
            sender.put(0, lines(0, 5000))
            assert not sender.close(WORD, 0.5)
        receiver.away = False
        for body in (tmp_path / UNDELIVERED).read_bytes().splitlines():
            url = f"{receiver.url}v1/attempts/job_1-1/telemetry"
            assert httpx2.post(url, content=body, headers={"Authorization": "Bearer ingest-token"}).status_code == 200
        assert texts(receiver, 0) == [str(seq) for seq in range(5000)]
        assert receiver.ended == WORD
    assert [path.name for path in tmp_path.iterdir()] == [UNDELIVERED]


def test_the_control_word_reaches_the_runner(tmp_path: Path) -> None:
    with receiving() as receiver, sending(receiver, tmp_path) as sender:
        receiver.wait_for(lambda: receiver.num_posts, 10)
        assert sender.control is Control.CONTINUE
        assert sender.checkpoint_requests == 0
        receiver.checkpoint_requests = 2
        receiver.control = Control.ABORT
        wait_for_abort(sender)
        assert sender.checkpoint_requests == 2
        assert sender.close(WORD, 10)
        assert receiver.ended == WORD


def test_a_service_that_keeps_refusing_ends_the_attempt(tmp_path: Path) -> None:
    with receiving(token="another") as receiver, sending(receiver, tmp_path, refusal_grace_s=0.5) as sender:
        wait_for_abort(sender)
