"""Image moments against numpy, and standard errors against what repeated samples show."""

from functools import reduce

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from syncbn.drift import (
    ImageMoments,
    design_effect,
    effective_count,
    log_var_standard_error,
    mean_standard_error,
    small_batch_var_bias,
)
from tests.syncbn.drift.fields import design_effect_of, field

F64 = torch.float64


def _images(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(shape, generator=generator, dtype=F64).pow(2) * 3 + torch.arange(shape[1]).view(-1, 1)
    return values.to(dtype)


def _assert_equal(moments: ImageMoments, other: ImageMoments, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(moments.pack(), other.pack(), rtol=rtol, atol=rtol)


def test_moments_of_equal_images_are_those_of_their_means() -> None:
    x = _images(5, 3, 7)
    moments = ImageMoments.of(x.view(5, 3, 7, 1))
    values, means = x.numpy(), x.mean(2).numpy()
    squares = ((values - values.mean((0, 2), keepdims=True)) ** 2).mean(2)
    assert moments.num_images == 5
    assert moments.positions == 7
    np.testing.assert_allclose(moments.mean, values.mean((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(moments.var, values.var((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(moments.between_var, means.var(0, ddof=1), rtol=1e-11)
    np.testing.assert_allclose(moments.square_between_var, squares.var(0, ddof=1), rtol=1e-10)
    np.testing.assert_allclose(mean_standard_error(moments), stats.sem(means, axis=0), rtol=1e-11)
    np.testing.assert_allclose(
        log_var_standard_error(moments), stats.sem(squares, axis=0) / values.var((0, 2)), rtol=1e-10
    )


def test_merged_moments_are_those_of_the_joined_batch_in_any_order() -> None:
    x = _images(9, 3, 7)
    parts = [ImageMoments.of(part) for part in (x[:1], x[1:1], x[1:6], x[6:])]
    for order in (parts, parts[::-1]):
        merged = reduce(ImageMoments.merge, order)
        _assert_equal(merged, ImageMoments.of(x))
        _assert_equal(ImageMoments.unpack(merged.pack()), merged, 0.0)


def test_images_of_unequal_size_weigh_by_their_positions() -> None:
    x, mask = _images(4, 2, 6), torch.zeros(4, 6, dtype=torch.bool)
    sizes = {0: 6, 1: 1, 3: 3}
    for image, size in sizes.items():
        mask[image, :size] = True
    masked = ImageMoments.of(torch.where(mask.unsqueeze(1), x, float("nan")), mask)
    _assert_equal(masked, reduce(ImageMoments.merge, [ImageMoments.of(x[i : i + 1, :, :s]) for i, s in sizes.items()]))
    for channel in range(2):
        values = x[:, channel][mask].numpy()
        totals = [(x[i, channel, :s].numpy() - values.mean()).sum() for i, s in sizes.items()]
        assert masked.num_images == 3
        assert masked.var[channel] == pytest.approx(values.var(), rel=1e-12)
        # The standard error of a ratio of totals, with the usual n / (n - 1).
        error = np.sqrt(np.square(totals).sum() * 3 / 2) / values.size
        assert mean_standard_error(masked)[channel] == pytest.approx(error, rel=1e-11)


def test_values_far_from_zero_and_in_half_precision_keep_their_digits() -> None:
    x = (_images(8, 2, 5) + 1e4).float()
    _assert_equal(ImageMoments.of(x), ImageMoments.of(x.double()), 1e-5)
    half = _images(8, 2, 5, dtype=torch.bfloat16)
    _assert_equal(ImageMoments.of(half), ImageMoments.of(half.double()), 1e-5)


def test_fewer_than_two_images_tell_no_error_and_none_are_neutral() -> None:
    assert ImageMoments.of(_images(1, 2, 5)).between_var.isnan().all()
    one = ImageMoments.of(_images(3, 2, 5))
    _assert_equal(ImageMoments.empty(2).merge(one).merge(ImageMoments.empty(2)), one, 1e-12)


@pytest.mark.parametrize(("num_images", "rho"), [(2, 0.9), (8, 0.9), (32, 0.5)])
def test_standard_errors_are_what_repeated_batches_show_of_correlated_positions(num_images: int, rho: float) -> None:
    generator, num_repeats, positions = torch.Generator().manual_seed(1), 4000, 16
    moments = ImageMoments.of(field(num_images, num_repeats, positions, rho, generator))  # each channel a repeat
    # z of the batch mean is Student's: the variance over images has n - 1 degrees of freedom.
    z = (moments.mean / mean_standard_error(moments)).numpy()
    assert stats.kstest(z, stats.t(num_images - 1).cdf).pvalue > 0.01
    effect = design_effect_of(positions, rho)
    assert design_effect(moments).median().item() == pytest.approx(effect, rel=0.6 if num_images == 2 else 0.12)
    torch.testing.assert_close(effective_count(moments) * design_effect(moments), moments.num_values.expand(4000))
    bias = (moments.var * num_images * positions / (num_images * positions - 1)).mean() - 1
    expected = small_batch_var_bias(torch.tensor(effect, dtype=F64), num_images, positions)
    # Four standard errors of the mean over repeats.
    assert abs(bias - expected) < 4 * moments.var.std() / num_repeats**0.5
    if num_images >= 32:
        log_var_error = log_var_standard_error(moments).square().mean().sqrt()
        assert log_var_error.item() == pytest.approx(moments.var.log().std().item(), rel=0.05)
