"""Sums over the positions of each image: all that is read of an activation, whatever is then reckoned from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn.kernels.aten import over_positions, statistics_dtype

_NEAR = 2.0  # standard deviations
_FLOAT32_SUM = 1 << 12  # squares of an image that are summed in float32
_BLOCK = 1 << 16  # values; what is written of so many stays in cache


@dataclass(frozen=True, eq=False)
class ImageSums:
    """By image and channel: how many positions there are, and the sums of ``x - center`` and of its square.

    Shape: ``positions``, ``total`` and ``squares`` are ``(N, C)``, ``center`` is ``(C,)``. Float64.
    ``center`` is anything within a few standard deviations of the mean, so that the sums lose nothing.
    """

    positions: Tensor
    total: Tensor
    squares: Tensor
    center: Tensor

    @classmethod
    def of(cls, input: Tensor, mask: Tensor | None = None) -> ImageSums:
        """Of ``(N, C, *)``, or of its values where ``mask`` (``(N, *)`` or less of it) is True.

        Accuracy: in float32 some 1e-7 of a standard deviation, or of the mean if that is larger.
        Cost: on a CPU two passes that write nothing, and three over channels with a mean beyond two standard
            deviations. Elsewhere, and with a mask, about two over ``input`` that write a copy. No device waits.
        """
        input = input.detach()
        if input.numel() == 0:
            return cls.none(input.size(1), input.device)
        values = input.to(statistics_dtype(input)).view(*input.shape, 1).flatten(2)  # (N, C, S)
        if mask is not None:
            return _masked(values, over_positions(mask, input).expand(-1, 1, *input.shape[2:]).flatten(1).unsqueeze(1))
        if input.device.type == "cpu":
            return _near_zero(values)
        center = values.mean((0, 2))
        return cls(_positions(values), *_about(center, values), center.double())

    @classmethod
    def none(cls, num_channels: int, device: torch.device | str | None = None) -> ImageSums:
        """Of no image at all."""
        nothing = torch.zeros(0, num_channels, dtype=torch.float64, device=device)
        return cls(nothing, nothing, nothing, torch.zeros(num_channels, dtype=torch.float64, device=device))

    @classmethod
    def side_by_side(cls, layers: Sequence[ImageSums]) -> ImageSums:
        """The channels of several layers in a row. Where a layer has fewer images, it gets some without positions."""
        most = max(len(layer.total) for layer in layers)
        rows = [
            F.pad(torch.stack([layer.positions, layer.total, layer.squares]), (0, 0, 0, most - len(layer.total)))
            if len(layer.total) < most
            else torch.stack([layer.positions, layer.total, layer.squares])
            for layer in layers
        ]
        positions, total, squares = torch.cat(rows, dim=2)
        return cls(positions, total, squares, torch.cat([layer.center for layer in layers]))

    def followed_by(self, other: ImageSums) -> ImageSums:
        """The images of both, about this center."""
        shift = other.center - self.center
        total = other.total + shift * other.positions
        squares = other.squares + 2 * shift * other.total + shift.square() * other.positions
        return ImageSums(
            torch.cat([self.positions, other.positions]),
            torch.cat([self.total, total]),
            torch.cat([self.squares, squares]),
            self.center,
        )


def _near_zero(values: Tensor) -> ImageSums:
    """About zero, save for channels whose mean is too far from it: those about their mean."""
    total = values.sum(2, dtype=values.dtype).double()
    parts = torch.split(values, _FLOAT32_SUM, dim=2)
    squares = sum((torch.linalg.vector_norm(part, dim=2).double().square() for part in parts), torch.zeros_like(total))
    num_values = values.size(0) * values.size(2)
    center = total.sum(0) / num_values
    is_far = center.square() > _NEAR**2 * (squares.sum(0) / num_values - center.square())
    if not is_far.any():
        return ImageSums(_positions(values), total, squares, torch.zeros_like(center))
    (far,) = is_far.nonzero(as_tuple=True)
    own = center[far].to(values.dtype)
    num_images = max(1, _BLOCK // (len(far) * values.size(2)))
    blocks = [_about(own, block[:, far]) for block in torch.split(values, num_images)]
    total[:, far], squares[:, far] = (torch.cat(sums) for sums in zip(*blocks, strict=True))
    center = torch.zeros_like(center).index_put_((far,), own.double())
    return ImageSums(_positions(values), total, squares, center)


def _masked(values: Tensor, valid: Tensor) -> ImageSums:
    """Of values ``(N, C, S)`` where ``valid``, ``(N, 1, S)``."""
    center = torch.where(valid, values, 0).sum((0, 2)) / valid.sum().clamp(min=1)
    deviation = torch.where(valid, values - center.unsqueeze(1), 0)
    positions = valid.sum(2, dtype=torch.float64).expand(-1, values.size(1))
    return ImageSums(positions, deviation.sum(2).double(), deviation.square().sum(2).double(), center.double())


def _about(center: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over positions of ``x - center`` and of its square, ``(N, C)``."""
    deviation = values - center.unsqueeze(1)
    return deviation.sum(2).double(), deviation.square_().sum(2).double()


def _positions(values: Tensor) -> Tensor:
    return values.new_full((), values.size(2), dtype=torch.float64).expand(values.shape[:2])
