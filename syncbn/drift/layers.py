"""Drift: how far a layer's running statistics are from the population's, and from those of other ranks.

Symbols, per channel: ``u``, ``w`` the running mean and variance, ``p``, ``q`` those of the population, both variances
unbiased; ``eps`` the layer's. Everything is computed in float64.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.agreement import Exchange
from syncbn.drift.distances import log_var_ratio, mean_shift, output_error
from syncbn.exchange import gather_over_ranks, peers
from syncbn.layers import running_moments, tracked_layers
from syncbn.moments import BatchMoments


@dataclass(frozen=True)
class LayerDrift:
    """Drift of one layer, over its ``num_channels`` channels. No number changes if a channel is rescaled (save by eps).

    ``rms_mean_shift``, ``max_mean_shift``: of ``|mean_shift|``, in standard deviations of the population;
        ``max_mean_shift_channel`` is the channel of the latter.
    ``mean_abs_log_var_ratio``, ``max_abs_log_var_ratio``: of ``|log_var_ratio|``, in nats; 0.69 is a factor of 2.
    ``output_error``: root of the mean over channels of `output_error`, in standard deviations of the layer's output
        before weight and bias.
    """

    layer: str
    num_channels: int
    rms_mean_shift: float
    max_mean_shift: float
    max_mean_shift_channel: int
    mean_abs_log_var_ratio: float
    max_abs_log_var_ratio: float
    output_error: float


def measure_drift(model: nn.Module, population: Mapping[str, BatchMoments]) -> list[LayerDrift]:
    """Drift of every layer that ``population`` names, in its order (`population_statistics`: that of execution).

    No collective. Reading the results waits for the device, once a layer.

    Raises:
        ValueError: if ``population`` names a layer that the model does not have or that keeps no statistics.
    """
    layers = tracked_layers(model)
    unknown = sorted(population.keys() - layers.keys())
    if unknown:
        raise ValueError(f"no layers with running statistics at {unknown}; the model has {sorted(layers)}")
    return [_layer_drift(path, layers[path], moments) for path, moments in population.items()]


def rank_disagreement(model: nn.Module, *, process_group: ProcessGroup | None = None) -> dict[str, float]:
    """By layer, the largest difference of any rank's running statistics from rank 0's, over ranks and channels.

    The larger of ``|u_r - u_0|`` and ``|sqrt(w_r) - sqrt(w_0)|``, both over ``sqrt(w_0 + eps)``: in rank 0's standard
    deviations. Exactly 0 where all ranks hold equal values, NaN where only some hold NaN. Zeros without other ranks.

    Cost: ONE gather of ``2C`` doubles a layer; all ranks must call.
    """
    layers = tracked_layers(model)
    group = peers(process_group)
    if not layers or group is None:
        return dict.fromkeys(layers, 0.0)
    statistics = {path: torch.cat(running_moments(layer)) for path, layer in layers.items()}
    vector = torch.cat(list(statistics.values()))
    rows = gather_over_ranks(vector, group, Exchange("comparison of running statistics", num_values=vector.numel()))
    parts = torch.split(rows, [vector.numel() for vector in statistics.values()], dim=1)
    return {path: _disagreement(part, layers[path].eps) for path, part in zip(statistics, parts, strict=True)}


def _layer_drift(path: str, layer: _BatchNorm, population: BatchMoments) -> LayerDrift:
    running_mean, running_var = running_moments(layer)
    mean, var = population.mean, population.unbiased_var
    shift = mean_shift(running_mean, mean, var, layer.eps).abs()
    ratio = log_var_ratio(running_var, var, layer.eps).abs()
    error = output_error(running_mean, running_var, mean, var, layer.eps)
    numbers = [_rms(shift), shift.max(), shift.argmax(), ratio.mean(), ratio.max(), error.mean().sqrt()]
    # One stack, so that the device is waited for once.
    values = torch.stack([number.double() for number in numbers]).tolist()
    rms_shift, max_shift, channel, mean_ratio, max_ratio, rms_error = values
    return LayerDrift(
        layer=path,
        num_channels=layer.num_features,
        rms_mean_shift=rms_shift,
        max_mean_shift=max_shift,
        max_mean_shift_channel=int(channel),
        mean_abs_log_var_ratio=mean_ratio,
        max_abs_log_var_ratio=max_ratio,
        output_error=rms_error,
    )


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def _disagreement(statistics: Tensor, eps: float) -> float:
    """Of ``(W, 2C)``: each rank's running mean, then variance."""
    mean, var = statistics.chunk(2, dim=1)
    values = torch.cat([mean, var.sqrt()], dim=1)
    scale = (var[0] + eps).sqrt().repeat(2)
    difference = (values - values[0]).abs() / scale
    equal = (statistics == statistics[0]) | (statistics.isnan() & statistics[0].isnan())
    return float(difference.masked_fill(equal, 0.0).max())
