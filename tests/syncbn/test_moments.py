"""Moments against torch's own statistics of the values themselves."""

import pytest
import torch
from torch import Tensor

from syncbn import BatchMoments


def _moments(values: Tensor) -> BatchMoments:
    """Of ``(n, C)`` float64 values, by torch's two-pass statistics."""
    var, mean = torch.var_mean(values, 0, correction=0)
    return BatchMoments(torch.tensor(float(len(values)), dtype=torch.float64), mean, var)


def _assert_equal(actual: BatchMoments, expected: BatchMoments, rtol: float = 1e-12) -> None:
    for name in ("count", "mean", "var"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=rtol, atol=1e-14)


def _values(offset: float = 0.0) -> Tensor:
    return torch.randn(50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 + offset


def test_packing_and_unpacking_returns_the_moments() -> None:
    moments = _moments(_values(5.0))
    assert moments.pack().shape == (7,)
    _assert_equal(BatchMoments.unpack(moments.pack()), moments)


@pytest.mark.parametrize("cut", [1, 20, 49])
def test_packed_vectors_and_merges_of_parts_give_the_whole(cut: int) -> None:
    values = _values()
    first, second = _moments(values[:cut]), _moments(values[cut:])
    _assert_equal(first.merge(second), _moments(values))
    _assert_equal(BatchMoments.unpack(first.pack() + second.pack()), _moments(values))


def test_merging_is_exact_far_from_zero() -> None:
    values = _values(1e6)
    merged = _moments(values[:20]).merge(_moments(values[20:]))
    _assert_equal(merged, _moments(values), rtol=1e-9)


def test_a_packed_variance_loses_the_digits_that_are_said() -> None:
    values = _values(2e4)  # 1e4 standard deviations from zero
    _assert_equal(BatchMoments.unpack(_moments(values).pack()), _moments(values), rtol=1e-7)


def test_nothing_is_neutral_and_never_nan() -> None:
    nothing, moments = BatchMoments.empty(3), _moments(_values())
    _assert_equal(nothing.merge(moments), moments)
    _assert_equal(moments.merge(nothing), moments)
    _assert_equal(BatchMoments.unpack(nothing.pack()), nothing)
    _assert_equal(nothing.merge(nothing), nothing)
    assert torch.equal(nothing.unbiased_var, torch.zeros(3, dtype=torch.float64))


def test_a_variance_is_never_negative() -> None:
    constant = torch.full((3, 4), 1e8 / 3, dtype=torch.float64)
    assert (BatchMoments.unpack(_moments(constant).pack()).var >= 0).all()


def test_the_unbiased_variance_has_bessels_correction() -> None:
    values = _values()
    torch.testing.assert_close(_moments(values).unbiased_var, values.var(0), rtol=1e-12, atol=0)
