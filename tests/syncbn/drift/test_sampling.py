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
from syncbn.drift.image_sums import ImageSums
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


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 5), (2, 4, 70, 71)], ids=str)
def test_sums_by_image_are_good_to_float32_wherever_the_mean_of_a_channel_is(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([0.0, 1.5, -40.0, 1e4]).view(1, 4, *[1] * (len(shape) - 2))
    x = torch.randn(shape, generator=generator) + means
    for values in (x, x.transpose(0, 1).contiguous().transpose(0, 1), x.movedim(1, -1).contiguous().movedim(-1, 1)):
        sums = ImageSums.of(values)
        deviation = values.double().numpy().reshape(*shape[:2], -1) - sums.center.numpy()[:, None]
        # Float32 holds a mean of 1e4 to 5e-4 by itself, but deviations from it exactly.
        np.testing.assert_allclose(sums.total / sums.positions, deviation.mean(2), rtol=0, atol=1e-6)
        np.testing.assert_allclose(sums.squares, (deviation**2).sum(2), rtol=2e-6)
        assert sums.center[0] == 0
        np.testing.assert_allclose(sums.center[2:], [-40.0, 1e4], atol=2.0)


def test_images_of_several_calls_and_layers_keep_their_sums() -> None:
    x, y = _images(7, 3, 5), _images(4, 2, 6) - 50
    calls = ImageSums.of(x[:3] + 90).followed_by(ImageSums.of(x[3:] + 90))
    _assert_equal(ImageMoments.of_layer(calls), ImageMoments.of(x + 90))
    row = ImageMoments.of_sums(ImageSums.side_by_side([calls, ImageSums.of(y), ImageSums.none(1)]))
    assert row.num_images.tolist() == [7, 7, 7, 4, 4, 0]
    assert row.positions.tolist() == [5, 5, 5, 6, 6, 1]
    for moments, channels in ((ImageMoments.of(x + 90), slice(0, 3)), (ImageMoments.of(y), slice(3, 5))):
        part = row.of_channels(channels)
        torch.testing.assert_close(part.mean, moments.mean, rtol=1e-9, atol=0)
        torch.testing.assert_close(part.sums, moments.sums, rtol=1e-9, atol=1e-9)


def test_stacked_ranks_pool_as_they_merge() -> None:
    x = _images(9, 3, 7) + 1e3
    ranks = [ImageMoments.of(part) for part in (x[:4], x[4:4], x[4:5], x[5:])]
    pooled = ImageMoments.stacked(ranks).pooled()
    whole = reduce(ImageMoments.merge, ranks)
    assert [pooled.num_images.item(), pooled.num_values.item(), pooled.num_squared.item()] == [9, 63, 9 * 49]
    torch.testing.assert_close(pooled.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(pooled.sums, whole.sums, rtol=1e-9, atol=1e-9)


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
