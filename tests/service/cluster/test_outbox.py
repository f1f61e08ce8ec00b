"""Telemetry waits in order, in bounded memory."""

import random
from pathlib import Path

import pytest

from service.cluster.outbox import Outbox, Record


def records(first: int, count: int) -> list[Record]:
    return [Record(1e9 + seq / 7, f'{{"type":"log","text":"ß\\n{seq}"}}') for seq in range(first, first + count)]


def test_records_come_out_as_they_went_in(tmp_path: Path) -> None:
    chance = random.Random(0)
    outbox = Outbox(0, tmp_path / "spool", max_in_memory=16)
    num_put = 0
    taken: list[Record] = []
    while len(taken) < 2000:
        if num_put < 2000 and chance.random() < 0.6:
            count = min(chance.randrange(1, 60), 2000 - num_put)
            outbox.put(records(num_put, count))
            num_put += count
        head = outbox.head(chance.randrange(1, 30), 10**6)
        kept = chance.randrange(len(head) + 1)
        outbox.acknowledge(outbox.first_seq + kept)
        taken += head[:kept]
        assert outbox.first_seq == len(taken)
        assert len(outbox) == num_put - len(taken)
    assert taken == records(0, 2000)
    assert not (tmp_path / "spool").exists()


def test_what_exceeds_the_memory_waits_on_disk(tmp_path: Path) -> None:
    outbox = Outbox(0, tmp_path / "deep" / "spool", max_in_memory=10)
    outbox.put(records(0, 10))
    assert not (tmp_path / "deep").exists()
    outbox.put(records(10, 90))
    assert len((tmp_path / "deep" / "spool").read_text().splitlines()) == 90
    assert len(outbox) == 100


def test_a_batch_is_bounded_in_bytes_and_never_empty(tmp_path: Path) -> None:
    outbox = Outbox(0, tmp_path / "spool")
    outbox.put([Record(0.0, "x" * 100)] * 5)
    assert len(outbox.head(512, 250)) == 2
    assert len(outbox.head(512, 1)) == 1


def test_an_acknowledgement_out_of_range_changes_nothing(tmp_path: Path) -> None:
    outbox = Outbox(0, tmp_path / "spool")
    outbox.put(records(0, 5))
    outbox.acknowledge(3)
    for wrong in (0, 2, 6, 1000):
        outbox.acknowledge(wrong)
        assert outbox.first_seq == 3
        assert len(outbox) == 2


def test_a_disk_that_takes_no_more_is_an_error_and_makes_no_hole(tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("a file where a folder is needed")
    outbox = Outbox(0, tmp_path / "occupied" / "spool", max_in_memory=4)
    with pytest.raises(OSError, match="occupied"):
        outbox.put(records(0, 5))
    assert len(outbox) == 0
    outbox.put(records(0, 4))
    assert outbox.head(10, 10**6) == records(0, 4)
