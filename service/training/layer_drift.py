"""Every number that a run tells of one layer's drift."""

from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from service.jobs import LayerDrift
from service.training.population import Population
from syncbn import BatchMoments, measure_drift, output_error
from syncbn.drift.distances import hellinger, jensen_shannon, symmetric_kl, wasserstein
from syncbn.drift.moving_average import initial_weight, lag_steps
from syncbn.drift.significance import population_deviation, threshold
from syncbn.layers import running_moments, tracked_layers

RUN_LEVEL = 0.01
"""How often, with nothing but chance at work, the largest z of all channels of one sample passes its threshold."""


def layer_drifts(
    model: nn.Module,
    population: Population,
    disagreement: Mapping[str, float],
    num_images: int,
    *,
    has_no_start: bool = False,
) -> tuple[LayerDrift, ...]:
    """The drift of every layer of ``population``, in its order. No collective; waits for the device once a layer.

    ``num_images`` share one batch statistic in training; ``disagreement`` is `syncbn.rank_disagreement`'s.
    ``has_no_start`` says that what the running statistics began with was replaced since.
    """
    layers = tracked_layers(model)
    drifts = measure_drift(model, population.moments)
    num_channels = sum(drift.num_channels for drift in drifts)
    return tuple(
        LayerDrift(
            **asdict(drift),
            rank_disagreement=disagreement[drift.layer],
            **_distances(layers[drift.layer], population.moments[drift.layer]),
            **_chance(layers[drift.layer], population, drift.layer, num_images, num_channels),
            **_age(layers[drift.layer], has_no_start),
        )
        for drift in drifts
    )


def _distances(layer: _BatchNorm, population: BatchMoments) -> dict[str, float]:
    moments = *running_moments(layer), population.mean, population.unbiased_var
    weight = torch.ones_like(population.mean) if layer.weight is None else layer.weight.detach().double()
    return _floats(
        weighted_output_error=_rms(weight * output_error(*moments, layer.eps).sqrt()),
        median_symmetric_kl=symmetric_kl(*moments, layer.eps).median(),
        rms_wasserstein=_rms(wasserstein(*moments, layer.eps)),
        median_hellinger=hellinger(*moments, layer.eps).median(),
        median_jensen_shannon=jensen_shannon(*moments, layer.eps).median(),
    )


def _chance(
    layer: _BatchNorm, population: Population, path: str, num_images: int, num_channels: int
) -> dict[str, float]:
    images = population.images[path]
    running_mean, _ = running_moments(layer)
    deviation = population_deviation(running_mean, images, layer.momentum, num_images, _num_batches(layer))
    # Where a channel does not vary its z is 0 / 0, or infinite; it has no share in the largest, nor in chance.
    varies = images.between_var > 0
    return _floats(
        max_abs_z=torch.where(varies, deviation.z.abs(), 0.0).max(),
        z_threshold=threshold(RUN_LEVEL, num_channels, images.num_images - 1),
        expected_mean_shift=_rms(torch.where(varies, deviation.expected_size, 0.0)),
    )


def _age(layer: _BatchNorm, has_no_start: bool) -> dict[str, float]:
    num_batches = _num_batches(layer)
    return {
        "initial_weight": 0.0 if has_no_start else initial_weight(layer.momentum, num_batches),
        "lag_steps": lag_steps(layer.momentum, num_batches),
    }


def _num_batches(layer: _BatchNorm) -> int:
    return 0 if layer.num_batches_tracked is None else int(layer.num_batches_tracked)


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def _floats(**numbers: Tensor) -> dict[str, float]:
    """As Python's own, in one wait for the device."""
    return dict(zip(numbers, torch.stack([number.double() for number in numbers.values()]).tolist(), strict=True))
