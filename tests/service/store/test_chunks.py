"""Steps kept as rows and as chunks against a dictionary: whatever is told, resumed, repeated or late."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sqlalchemy import func, select

from service.jobs import IngestBatch, JobState, attempt_id
from service.store import STEP, JobStore
from service.store.chunks import CHUNK_ROWS, extents
from service.store.schema import steps as rows
from service.store.steps import MAX_ROWS_OF_RANK
from tests.service.store.telling import rank_batch, spec, step

NUM_RANKS = 3
LAST = 6_000

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
        with np.errstate(invalid="ignore"):
            means = {s: float(np.mean(by_step[s])) for s in sorted(by_step)}
        self._compare(None, first, last, means)

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


@st.composite
def _acts(draw: st.DrawFn) -> list[tuple[bool, list[tuple[Key, float]], bool]]:
    """Whether a new attempt begins, what it tells then, and which way."""
    acts = []
    for _ in range(draw(st.integers(1, 6))):
        in_bulk = draw(st.booleans())
        ranks = draw(st.sets(st.integers(0, NUM_RANKS - 1), min_size=1))
        first = draw(st.integers(0, LAST))
        stride = draw(st.sampled_from([1, 1, 1, 3, 40]))
        length = draw(st.integers(1, 4_000 if in_bulk else 300))
        noise = np.random.default_rng(draw(st.integers(0, 99)))
        lags = {rank: draw(st.sampled_from([0, 0, 0, -1500, 700])) for rank in ranks}
        numbers = [n for n in range(first, first + length * stride, stride) if n <= LAST]
        told = [((rank, max(n + lags[rank], 0)), float(noise.normal())) for rank in sorted(ranks) for n in numbers]
        odd = draw(st.lists(st.tuples(st.integers(0, len(told) - 1), st.sampled_from([math.nan, math.inf, -math.inf]))))
        for at, value in odd[:3]:
            told[at] = (told[at][0], value)
        if draw(st.booleans()):
            told += [(key, loss + 1) for key, loss in told[: draw(st.integers(1, 20))]]
        acts.append((draw(st.booleans()), told, in_bulk))
    return acts


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # to make thousands of steps smaller takes minutes
)
@given(acts=_acts(), first=st.integers(0, LAST), length=st.integers(0, LAST))
def test_rows_and_chunks_together_are_a_dictionary(
    store: JobStore, acts: list[tuple[bool, list[tuple[Key, float]], bool]], first: int, length: int
) -> None:
    run = Run(store)
    for resumes, told, in_bulk in acts:
        if resumes:
            run.resume()
        run.tell(told, in_bulk)
    run.check_form()
    run.check(0, 2 * LAST)
    run.check(first, first + length)
