"""Estimators of population statistics against numpy, for any batches and however they are spread over ranks."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from syncbn import BatchMoments, Estimator
from syncbn.estimators import Estimate, estimate_for

Array = NDArray[np.float64]
NUM_CHANNELS = 2


def _batches(sizes: list[int], seed: int) -> list[Array]:
    """``(size, 2)`` each, of unlike means and spreads."""
    generator = np.random.default_rng(seed)
    return [generator.normal(3 * number, 1 + number, (size, NUM_CHANNELS)) for number, size in enumerate(sizes)]


def _moments(batch: Array) -> BatchMoments:
    if len(batch) == 0:
        return BatchMoments.empty(NUM_CHANNELS)
    mean, var = (torch.from_numpy(np.asarray(part)) for part in (batch.mean(0), batch.var(0)))
    return BatchMoments(torch.tensor(float(len(batch)), dtype=torch.float64), mean, var)


def _fed(estimator: Estimator, momentum: float | None, batches: list[Array]) -> Estimate:
    estimate = estimate_for(estimator, NUM_CHANNELS, momentum)
    for batch in batches:
        estimate.add(_moments(batch))
    return estimate


def _reckon(estimator: Estimator, momentum: float | None, shares: list[list[Array]]) -> tuple[Any, Any]:
    """Mean and variance for evaluation from every rank's batches, those without values left out."""
    shares = [[batch for batch in share if len(batch)] for share in shares]
    batches = [batch for share in shares for batch in share]
    if estimator is Estimator.POOLED:
        joined = np.concatenate(batches)
        return joined.mean(0), joined.var(0, ddof=1)
    weights = np.ones(len(batches))
    if estimator is Estimator.MOVING_AVERAGE and momentum is not None:
        ages = [age for share in shares for age in reversed(range(len(share)))]
        weights = momentum * (1 - momentum) ** np.array(ages, dtype=np.float64)
    means = np.array([batch.mean(0) for batch in batches])
    variances = np.array([batch.var(0, ddof=1) for batch in batches])
    return np.average(means, 0, weights), np.average(variances, 0, weights)


@settings(deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.one_of(st.just(0), st.integers(2, 6)), min_size=1, max_size=7).filter(any),
    world_size=st.integers(1, 4),
    estimator=st.sampled_from(Estimator),
    momentum=st.sampled_from([None, 0.1, 0.7, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_batches_on_any_ranks_estimate_what_numpy_does(
    sizes: list[int], world_size: int, estimator: Estimator, momentum: float | None, seed: int
) -> None:
    batches = _batches(sizes, seed)
    shares = [batches[rank::world_size] for rank in range(world_size)]
    estimates = [_fed(estimator, momentum, share) for share in shares]
    result = estimates[0].unpack(torch.stack([estimate.pack() for estimate in estimates]).sum(0))
    mean, unbiased_var = _reckon(estimator, momentum, shares)
    assert result.count == sum(sizes)
    np.testing.assert_allclose(result.mean.numpy(), mean, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(result.unbiased_var.numpy(), unbiased_var, rtol=1e-10, atol=1e-10)


def test_an_estimator_is_also_known_by_its_name_and_no_other() -> None:
    assert type(estimate_for("pooled", 2, None)) is type(estimate_for(Estimator.POOLED, 2, None))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'mean' is not a valid Estimator"):
        estimate_for("mean", 2, None)  # type: ignore[arg-type]
