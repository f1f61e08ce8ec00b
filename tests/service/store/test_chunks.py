"""Steps kept as rows and as chunks against a dictionary: whatever is told, resumed, repeated or late."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sqlalchemy import func, select

from service.errors import Conflict
from service.jobs import IngestBatch, JobState, attempt_id
from service.store import STEP, JobStore
from service.store.chunks import CHUNK_ROWS, extents
from service.store.schema import steps as rows
from service.store.steps import MAX_ROWS, MAX_ROWS_OF_RANK
from tests.service.store.telling import rank_batch, spec, step

NUM_RANKS = 3
LAST = 5_000

Key = tuple[int, int]
"""Rank and step."""


class Run:
    """A job that is told steps, and the dictionary of what a reader should find."""

    def __init__(self, store: JobStore, num_ranks: int = NUM_RANKS) -> None:
        self.store = store
        self.job, self.token = store.start_attempt(store.create(spec(num_workers=num_ranks))[0])
        self.model: dict[Key, tuple[int, float]] = {}
        self._next_seq: dict[int, int] = {}

    def resume(self) -> None:
        recovering = self.store.transition(self.store.get(self.job.id), JobState.RECOVERING)
        self.job, self.token = self.store.start_attempt(recovering)
        self._next_seq = {}

    def tell(self, told: list[tuple[Key, float]], in_bulk: bool) -> None:
        """Tell the loss of each rank and step, in this order."""
        (self._tell_in_bulk if in_bulk else self._ingest)(told)
        numbers = [number for (_, number), _ in told]
        low, high, attempt = min(numbers), max(numbers), self.job.attempt
        gone = [key for key, (of, _) in self.model.items() if low <= key[1] <= high and of < attempt]
        for key in gone:
            del self.model[key]
        self.model.update((key, (attempt, loss)) for key, loss in told)

    def _tell_in_bulk(self, told: list[tuple[Key, float]]) -> None:
        self.store.record_steps(self.job.id, self.job.attempt, _array(told))

    def _ingest(self, told: list[tuple[Key, float]]) -> None:
        parts = []
        for rank in {rank for (rank, _), _ in told}:
            facts = [step(number, loss) for (of, number), loss in told if of == rank]
            parts.append(rank_batch(facts, rank, self._next_seq.get(rank, 0)))
            self._next_seq[rank] = self._next_seq.get(rank, 0) + len(facts)
        self.store.ingest(attempt_id(self.job.id, self.job.attempt), self.token, IngestBatch(batches=tuple(parts)))

    def check(self, first: int, last: int) -> None:
        """What is read between two steps is what the dictionary says, of each rank and in the mean."""
        for rank in range(NUM_RANKS):
            expected = {
                s: loss for (of, s), (_, loss) in sorted(self.model.items()) if of == rank and first <= s <= last
            }
            self._compare(rank, first, last, expected)
        by_step: dict[int, list[float]] = {}
        for (_, number), (_, loss) in sorted(self.model.items()):
            if first <= number <= last:
                by_step.setdefault(number, []).append(loss)
        self._compare(None, first, last, {s: sum(by_step[s]) / len(by_step[s]) for s in sorted(by_step)})

    def _compare(self, rank: int | None, first: int, last: int, expected: dict[int, float]) -> None:
        read = {"rank": rank, "first_step": first, "last_step": last}
        series = self.store.metric(self.job.id, "train/loss", **read, max_points=None)
        assert list(series.steps) == list(expected)
        np.testing.assert_allclose(series.values, list(expected.values()), rtol=1e-12, atol=1e-9)  # other order of sums
        thinned = self.store.metric(self.job.id, "train/loss", **read, max_points=50)
        told = dict(zip(thinned.steps, thinned.values, strict=True))
        assert len(told) <= 50
        assert thinned.num_points == len(expected)
        assert any(map(math.isnan, told.values())) == any(map(math.isnan, expected.values()))
        finite = [value for value in expected.values() if math.isfinite(value)]
        if finite:
            told_finite = [value for value in told.values() if math.isfinite(value)]
            assert min(told_finite) == pytest.approx(min(finite), rel=1e-12)
            assert max(told_finite) == pytest.approx(max(finite), rel=1e-12)

    def check_form(self) -> None:
        """Rows stay few, chunks full and apart; no step is in two places."""
        with self.store._database.read() as connection:
            of_job = rows.c.job_id == self.job.id
            kept = connection.execute(select(rows.c.rank, func.count()).where(of_job).group_by(rows.c.rank)).all()
            found = extents(connection, self.job.id)
            keys = connection.execute(select(rows.c.rank, rows.c.step).where(of_job)).all()
        assert all(count <= MAX_ROWS_OF_RANK for _, count in kept)
        assert sum(count for _, count in kept) + sum(e.num_rows for e in found) == len(self.model)
        for rank in range(NUM_RANKS):
            mine = [e for e in found if e.rank == rank]
            assert all(e.num_rows <= CHUNK_ROWS for e in mine)
            assert all(before.last_step < after.first_step for before, after in pairwise(mine))
            assert not any(e.first_step <= s <= e.last_step for of, s in keys if of == rank for e in mine)


def _array(told: list[tuple[Key, float]]) -> NDArray[np.void]:
    return np.array([(rank, number, 0, 0, loss, 0.1, 0.5) for (rank, number), loss in told], dtype=STEP)


def _random_act(noise: np.random.Generator) -> tuple[list[tuple[Key, float]], bool]:
    """Steps of some ranks in order, with lags, gaps, repetitions and odd values; and whether to tell them in bulk."""
    in_bulk = bool(noise.integers(2))
    ranks = noise.permutation(NUM_RANKS)[: noise.integers(1, NUM_RANKS + 1)]
    first, stride = noise.integers(0, LAST), noise.choice([1, 1, 1, 3, 40])
    numbers = np.arange(first, LAST, stride)[: noise.integers(1, 3_500 if in_bulk else 300)]
    lags = noise.choice([0, 0, 0, -1500, 700], NUM_RANKS)
    told = [
        ((int(rank), max(int(number + lags[rank]), 0)), float(noise.normal())) for rank in ranks for number in numbers
    ]
    for at, value in zip(noise.integers(0, len(told), 3), [math.nan, math.inf, -math.inf], strict=True):
        told[at] = (told[at][0], value)
    told += [(key, loss + 1) for key, loss in told[: noise.integers(0, 20)]]
    return told, in_bulk


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], phases=[Phase.generate]
)
@given(seed=st.integers(0, 2**32 - 1))
def test_rows_and_chunks_together_are_a_dictionary(store: JobStore, seed: int) -> None:
    noise = np.random.default_rng(seed)
    run = Run(store)
    for _ in range(noise.integers(2, 7)):
        if noise.random() < 0.3:
            run.resume()
        run.tell(*_random_act(noise))
    run.check_form()
    run.check(0, 2 * LAST)
    first = int(noise.integers(0, LAST))
    run.check(first, first + int(noise.integers(0, LAST)))


def _stretch(first: int, last: int, stride: int = 1, rank: int = 0) -> list[tuple[Key, float]]:
    return [((rank, number), 1.0 / (number + 9 + rank)) for number in range(first, last + 1, stride)]


def test_what_comes_before_between_and_into_chunks_finds_its_place(store: JobStore) -> None:
    run = Run(store)
    run.tell(_stretch(1_001, 4_000), in_bulk=True)
    run.tell(_stretch(1, 500), in_bulk=True)
    run.tell(_stretch(4_001, 7_000), in_bulk=True)  # what becomes chunks now lies on both sides of one that is there
    run.tell(_stretch(501, 1_000, 2), in_bulk=False)
    run.tell(_stretch(7_001, 13_001, 2), in_bulk=True)
    run.tell(_stretch(8_002, 8_502, 2), in_bulk=False)  # between the steps of a chunk of the same attempt
    run.tell(_stretch(1, 9_000, rank=1), in_bulk=True)
    run.check_form()
    run.check(0, 20_000)
    with store._database.read() as connection:
        found = extents(connection, run.job.id)
    for extent in found[:3]:
        run.check(extent.first_step, extent.first_step)
        run.check(extent.last_step, extent.last_step)
        run.check(extent.last_step - 1, extent.last_step + 1)


def test_a_wide_jobs_rows_stay_few_all_together(tmp_path: Path) -> None:
    store = JobStore.open(tmp_path / "jobs.sqlite")
    num_ranks = 300
    job, _ = store.start_attempt(store.create(spec(num_workers=num_ranks))[0])
    for first, count in [(1, 1_100), (1_101, 800)]:
        told = np.zeros(count * num_ranks, STEP)
        told["rank"] = np.repeat(np.arange(num_ranks), count)
        told["step"] = np.tile(np.arange(first, first + count), num_ranks)
        told["loss"] = told["step"] + told["rank"]
        store.record_steps(job.id, 1, told)
    with store._database.read() as connection:
        num_rows = connection.execute(select(func.count()).where(rows.c.job_id == job.id)).scalar_one()
        found = extents(connection, job.id)
    assert num_rows <= MAX_ROWS
    assert num_rows + sum(extent.num_rows for extent in found) == 1_900 * num_ranks
    assert len(found) == num_ranks  # each is filled up, not followed by a new one
    mean = store.metric(job.id, "train/loss", max_points=None)  # more than one window
    assert mean.steps == tuple(range(1, 1_901))
    assert mean.values == tuple(float(n) + (num_ranks - 1) / 2 for n in range(1, 1_901))
    store.close()


def test_only_the_newest_attempt_of_a_job_that_has_not_ended_may_record_steps(store: JobStore) -> None:
    run = Run(store)
    run.resume()
    with pytest.raises(Conflict, match="attempt 1 tells nothing more"):
        store.record_steps(run.job.id, 1, _array(_stretch(1, 3)))
    with pytest.raises(ValueError, match="step -2 cannot be"):
        store.record_steps(run.job.id, 2, _array(_stretch(-2, 3)))
    run.tell(_stretch(1, 3), in_bulk=True)
    store.transition(store.transition(run.job, JobState.RUNNING), JobState.SUCCEEDED)
    with pytest.raises(Conflict, match="succeeded"):
        store.record_steps(run.job.id, 2, _array(_stretch(1, 3)))
    assert store.metric(run.job.id, "train/loss").num_points == 3
