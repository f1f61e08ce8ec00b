"""Images whose positions depend on each other in a way that is known."""

import numpy as np
import torch
from torch import Tensor


def field(num_images: int, num_channels: int, positions: int, rho: float, generator: torch.Generator) -> Tensor:
    """``(N, C, S)`` of variance 1, in which neighbouring positions have the correlation ``rho``. Float64."""
    noise = torch.randn(num_images, num_channels, positions, generator=generator, dtype=torch.float64)
    values = noise.clone()
    for place in range(1, positions):
        values[..., place] = rho * values[..., place - 1] + (1 - rho**2) ** 0.5 * noise[..., place]
    return values


def design_effect_of(positions: int, rho: float) -> float:
    """Of such a field: S times the variance of an image's mean."""
    place = np.arange(positions)
    return float((rho ** np.abs(place[:, None] - place)).sum() / positions)
