"""What chance alone does to batch statistics, with the image as the unit of sampling.

The positions of an image are not independent of each other, images are. So the standard error of a batch mean comes
from how the means of single images differ, and not from how values do (a ratio estimator over clusters: Cochran 1977,
*Sampling Techniques*, chapter 6). In a fully connected layer an image is one value, and both agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from syncbn.kernels.aten import over_positions, statistics_dtype

_NUM_SCALARS = 3
_NUM_ROWS = 7


@dataclass(frozen=True, eq=False)
class ImageMoments:
    """Moments of a batch per channel that remember which values came from one image; exact under `merge`.

    With ``S`` the number of (valid) positions of an image, ``T`` the sum over them of ``x - mean`` and ``Q`` that of
    ``(x - mean)^2``: sums over images of ``S``, ``S^2`` and, per channel, ``Q, T^2, TS, QT, QS, Q^2``.

    Shape: ``num_images``, ``num_values`` and ``num_squared`` are ``()``, ``mean`` is ``(C,)``, ``sums`` is ``(6, C)``;
        float64 on one device. Nothing here waits for a GPU.
    Images without a valid position do not count. No images at all are neutral in every merge.
    """

    num_images: Tensor
    num_values: Tensor
    """Positions of all images together, per channel."""
    num_squared: Tensor
    """Sum over images of the square of their number of positions."""
    mean: Tensor
    sums: Tensor
    """Sums over images of ``Q, T^2, TS, QT, QS, Q^2``, about `mean`."""

    @classmethod
    def of(cls, input: Tensor, mask: Tensor | None = None) -> ImageMoments:
        """The moments of ``(N, C, *)``, or of its values where ``mask`` (``(N, *)`` or less of it) is True.

        Cost: about two passes over ``input``, with a mask three; then ``O(NC)``.
        """
        input = input.detach()
        if input.numel() == 0:
            return cls.empty(input.size(1), input.device)
        positions, total, squares, center = _image_sums(input, mask)
        return _about_own_mean(positions, total, squares, center)

    @classmethod
    def empty(cls, num_channels: int, device: torch.device | str | None = None) -> ImageMoments:
        """The moments of no image at all."""
        size = _NUM_SCALARS + _NUM_ROWS * num_channels
        return cls.unpack(torch.zeros(size, dtype=torch.float64, device=device))

    @property
    def positions(self) -> Tensor:
        """Mean number of valid positions of an image, ``()``; 1 for no images."""
        return torch.where(self.num_images > 0, self.num_values / self.num_images.clamp(min=1), 1.0)

    @property
    def var(self) -> Tensor:
        """Biased variance of all values, ``(C,)``."""
        return self.sums[0] / self.num_values.clamp(min=1)

    @property
    def between_var(self) -> Tensor:
        """Unbiased variance over images of their mean, ``(C,)``: ``s2``. NaN with fewer than two images."""
        return self._over_images(self.sums[1])

    @property
    def square_between_var(self) -> Tensor:
        """Unbiased variance over images of the mean of ``(x - mean)^2`` in each, ``(C,)``. NaN as `between_var`."""
        return self._over_images(self._spread(self.sums)[1])

    def spread_about(self, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over values of ``(x - reference)^2``, call it ``e``, and sum over images of ``(Q - e S)^2``.

        ``Q`` is about ``reference`` here. Both are ``(C,)``, as ``reference`` is.
        """
        return self._spread(self._sums_about(self.mean - reference))

    def merge(self, other: ImageMoments) -> ImageMoments:
        """The moments of both batches together, without loss (as Chan, Golub and LeVeque 1979, eq. 2.1)."""
        num_values = self.num_values + other.num_values
        delta = other.mean - self.mean
        share = other.num_values / num_values.clamp(min=1)
        sums = self._sums_about(-delta * share) + other._sums_about(delta * (1 - share))
        mean = self.mean + delta * share
        num_images, num_squared = self.num_images + other.num_images, self.num_squared + other.num_squared
        return ImageMoments(num_images, num_values, num_squared, mean, sums)

    def pack(self) -> Tensor:
        """One vector of ``7C + 3`` doubles, to be gathered; such vectors do not add up, what they unpack to merges."""
        scalars = torch.stack([self.num_images, self.num_values, self.num_squared])
        return torch.cat([scalars, self.mean, self.sums.flatten()])

    @classmethod
    def unpack(cls, vector: Tensor) -> ImageMoments:
        """Inverse of `pack`."""
        rows = vector[_NUM_SCALARS:].view(_NUM_ROWS, -1)
        return cls(vector[0], vector[1], vector[2], rows[0], rows[1:])

    def _sums_about(self, shift: Tensor) -> Tensor:
        """`sums` about ``mean - shift``: there ``T`` is ``T + shift S`` and ``Q`` is ``Q + 2 shift T + shift^2 S``."""
        q, tt, ts, qt, qs, qq = self.sums
        ss, d = self.num_squared, shift
        d2 = d.square()
        return torch.stack(
            [
                q + d2 * self.num_values,  # T sums to zero about the mean
                tt + 2 * d * ts + d2 * ss,
                ts + d * ss,
                qt + d * qs + 2 * d * tt + 3 * d2 * ts + d2 * d * ss,
                qs + 2 * d * ts + d2 * ss,
                qq + 4 * d * qt + 2 * d2 * qs + 4 * d2 * tt + 4 * d2 * d * ts + d2.square() * ss,
            ]
        )

    def _spread(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        q, _, _, _, qs, qq = sums
        mean = q / self.num_values.clamp(min=1)
        return mean, (qq - 2 * mean * qs + mean.square() * self.num_squared).clamp(min=0)

    def _over_images(self, squares: Tensor) -> Tensor:
        return squares / ((self.num_images - 1) * self.positions.square())


def mean_standard_error(moments: ImageMoments) -> Tensor:
    """Of the batch mean, ``(C,)``, in units of the values: ``sqrt(s2 / n)``. NaN with fewer than two images."""
    return (moments.between_var / moments.num_images).sqrt()


def log_var_standard_error(moments: ImageMoments) -> Tensor:
    """Of the logarithm of the batch variance, ``(C,)``, in nats. NaN with fewer than two images.

    For large samples: within a few percent from 32 images on; with 8 it may be 15 % too small, with 2 by half.
    """
    return (moments.square_between_var / moments.num_images).sqrt() / moments.var


def design_effect(moments: ImageMoments) -> Tensor:
    """``D = S s2 / q``, ``(C,)``: how many positions weigh as much as an independent one (Kish 1965). Mostly 0 to S."""
    return moments.positions * moments.between_var / _population_var(moments)


def effective_count(moments: ImageMoments) -> Tensor:
    """``n S / D``, ``(C,)``: how many independent values would tell as much of the mean."""
    return moments.num_values / design_effect(moments)


def small_batch_var_bias(effect: Tensor, num_images: int, positions: int) -> Tensor:
    """Relative bias of a batch variance with Bessel's correction: ``-(D - 1) / (n S - 1)``, of ``effect``'s shape.

    The correction assumes independent values; with design effect ``D`` the mean of a batch varies ``D`` times as much.
    """
    return -(effect - 1) / (num_images * positions - 1)


def _population_var(moments: ImageMoments) -> Tensor:
    """Unbiased under any correlation inside images: the variance about the mean that the batch only estimates."""
    return moments.var + moments.between_var / moments.num_images


def _image_sums(input: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``S`` ``(N,)``; sums of ``x - center`` and of its square by image, ``(N, C)``; ``center`` ``(C,)``. Float64.

    The center is near the mean and exact in the type of the values, so that the difference loses nothing.
    """
    values = input.to(statistics_dtype(input)).flatten(2) if input.dim() > 2 else input.to(statistics_dtype(input))
    values = values.unsqueeze(2) if values.dim() == 2 else values  # (N, C, S)
    valid = None if mask is None else over_positions(mask, input).expand(-1, 1, *input.shape[2:]).flatten(1)  # (N, S)
    if valid is None:
        center = values.mean((0, 2))
        positions = values.new_full((values.size(0),), values.size(2), dtype=torch.float64)
        deviation = values - center.unsqueeze(1)
    else:
        valid = valid.unsqueeze(1)
        center = torch.where(valid, values, 0).sum((0, 2)) / valid.sum().clamp(min=1)
        positions = valid.sum((1, 2), dtype=torch.float64)
        deviation = torch.where(valid, values - center.unsqueeze(1), 0)
    return positions, deviation.sum(2).double(), deviation.square().sum(2).double(), center.double()


def _about_own_mean(positions: Tensor, total: Tensor, squares: Tensor, center: Tensor) -> ImageMoments:
    num_values = positions.sum()
    shift = total.sum(0) / num_values.clamp(min=1)
    s = positions.unsqueeze(1)
    q = squares - 2 * shift * total + shift.square() * s
    t = total - shift * s
    products = torch.stack([q, t * t, t * s, q * t, q * s, q * q]).sum(1)
    return ImageMoments((positions > 0).sum().double(), num_values, positions.square().sum(), center + shift, products)
