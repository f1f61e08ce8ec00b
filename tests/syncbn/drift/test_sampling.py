"""Image moments against numpy, and standard errors against what repeated samples show."""

import numpy as np
import torch
from torch import Tensor

from syncbn.drift import ImageMoments

F64 = torch.float64


def _images(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(shape, generator=generator, dtype=F64).pow(2) * 3 + torch.arange(shape[1]).view(-1, 1)
    return values.to(dtype)


def _assert_equal(moments: ImageMoments, other: ImageMoments, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(moments.pack(), other.pack(), rtol=rtol, atol=rtol)


def test_moments_of_equal_images_are_those_of_their_means() -> None:
    x = _images(5, 3, 7)
    moments = ImageMoments.of(x)
    values, means = x.numpy(), x.mean(2).numpy()
    squares = ((values - values.mean((0, 2), keepdims=True)) ** 2).mean(2)
    assert moments.num_images == 5
    assert moments.positions == 7
    np.testing.assert_allclose(moments.mean, values.mean((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(moments.var, values.var((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(moments.between_var, means.var(0, ddof=1), rtol=1e-11)
    np.testing.assert_allclose(moments.square_between_var, squares.var(0, ddof=1), rtol=1e-10)


def test_merged_moments_are_those_of_the_joined_batch() -> None:
    x = _images(9, 3, 7)
    parts = [ImageMoments.of(part) for part in (x[:1], x[1:1], x[1:6], x[6:])]
    merged = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])
    _assert_equal(merged, ImageMoments.of(x))
    _assert_equal(ImageMoments.unpack(merged.pack()), merged, 0.0)
