import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributed as dist
from torch import Tensor, nn

from service.jobs import LayerDrift
from service.training.layer_drift import layer_drifts
from service.training.population import Population, measure_population
from tests.ranks import run_ranks

NUM_IMAGES = 60


def _model() -> nn.Sequential:
    """Running statistics after five batches of 16 images, with momentum 0.2, and weights that are not 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.2), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    with torch.no_grad():
        dict(model.named_parameters())["0.weight"].copy_(torch.tensor([0.5, -2.0, 1.0]))
    for step in range(5):
        model(_images(16, seed=step))
    return model


def _images(size: int, seed: int) -> Tensor:
    """Each image has a brightness of its own, so that its positions are not independent."""
    generator = torch.Generator().manual_seed(100 + seed)
    brightness = torch.randn(size, 3, 1, 1, generator=generator, dtype=torch.float64)
    return brightness + torch.randn(size, 3, 5, 5, generator=generator, dtype=torch.float64)


def _batches(rank: int, world_size: int) -> list[tuple[Tensor, Tensor]]:
    images = _images(NUM_IMAGES, seed=50)
    return [(part, torch.zeros(len(part))) for part in torch.split(images, 20)[rank::world_size]]


def _measured(rank: int = 0, world_size: int = 1) -> tuple[tuple[LayerDrift, ...], Population]:
    model = _model()
    population = measure_population(model, _batches(rank, world_size))
    return layer_drifts(model, population, {"0": 0.0, "2": 0.0}, num_images=16), population


def test_every_number_of_a_layer_is_what_numpy_makes_of_it() -> None:
    model = _model()
    state: dict[str, Any] = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    u, w = state["0.running_mean"], state["0.running_var"]
    x = _images(NUM_IMAGES, seed=50).numpy()
    p, q = x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3)) * 1500 / 1499
    wide, true = w + 1e-5, q + 1e-5
    between = x.mean(axis=(2, 3)).var(axis=0, ddof=1)
    error = (p - u) ** 2 / wide + (np.sqrt(true / wide) - 1) ** 2 * q / true
    kl = (wide / true + true / wide - 2) / 2 + (u - p) ** 2 * (1 / wide + 1 / true) / 2
    se = np.sqrt(between * (0.2 / 1.8 / 16 + 1 / NUM_IMAGES))
    first = _measured()[0][0]
    found = [
        first.weighted_output_error,
        first.median_symmetric_kl,
        first.rms_wasserstein,
        first.max_abs_z,
        first.z_threshold,
        first.expected_mean_shift,
        first.initial_weight,
        first.lag_steps,
    ]
    expected = [
        np.sqrt((np.array([0.5, -2.0, 1.0]) ** 2 * error).mean()),
        np.median(kl),
        np.sqrt((((u - p) ** 2 + (np.sqrt(wide) - np.sqrt(true)) ** 2) / true).mean()),
        np.abs((u - p) / se).max(),
        scipy.stats.t.isf(0.01 / 7 / 2, NUM_IMAGES - 1),  # of the seven channels of both layers
        np.sqrt((se**2 / x.var(axis=(0, 2, 3))).mean()),
        0.8**5,
        4.0,
    ]
    assert found == pytest.approx(expected, rel=1e-9)
    assert first.median_hellinger is not None
    assert first.median_jensen_shannon is not None
    # To second order both are the same quarter of the symmetric divergence: see any text on f-divergences.
    assert 2 * first.median_hellinger**2 == pytest.approx(float(np.median(kl)) / 4, rel=0.3)
    assert first.median_jensen_shannon == pytest.approx(float(np.median(kl)) / 8, rel=0.3)


def _as_rank() -> tuple[tuple[LayerDrift, ...], dict[str, tuple[float, int]]]:
    drifts, population = _measured(dist.get_rank(), dist.get_world_size())
    return drifts, {path: (m.mean.sum().item(), int(m.num_images)) for path, m in population.images.items()}


def test_ranks_find_the_same_bits_and_what_one_rank_finds() -> None:
    (alone, _), (first, images), (second, others) = (_measured(), *run_ranks(2, _as_rank))
    assert first == second
    assert images == others
    assert [layer.layer for layer in first] == ["0", "2"]
    assert {count for _, count in images.values()} == {NUM_IMAGES}
    for one, other in zip(first, alone, strict=True):
        assert one.model_dump() == pytest.approx(other.model_dump(), rel=1e-9, abs=1e-12)


def test_a_channel_that_does_not_vary_has_no_share_in_chance() -> None:
    model = nn.BatchNorm1d(2).double()
    images = torch.stack([torch.linspace(-1, 1, 9, dtype=torch.float64), torch.full((9,), 0.5).double()], dim=1)
    population = measure_population(model, [(images, torch.zeros(9))])
    (layer,) = layer_drifts(model, population, {"": 0.0}, num_images=4)
    assert layer.max_abs_z is not None
    assert math.isfinite(layer.max_abs_z)
    assert math.isfinite(layer.expected_mean_shift or math.nan)
