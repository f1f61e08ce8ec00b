"""Samples: what the BatchNorm layers of all ranks saw in one training step, in numbers per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.drift.moving_average import effective_batches, initial_weight
from syncbn.drift.sampling import ImageMoments, design_effect
from syncbn.monitor.channels import ChannelStates
from syncbn.monitor.finding import RankFinding
from syncbn.monitor.heard import Heard
from syncbn.monitor.normal_score import normal_score

MAX_NAMED = 32
"""So many channels of each state are named."""


@dataclass(frozen=True)
class LayerSample:
    """One layer in one training step, over all ranks.

    ``num_images``, ``positions_per_image``: of all calls of the step; only positions that a mask leaves count.
    ``design_effect``: median over channels of `syncbn.drift.design_effect`.
    ``mean_shift_noise``: root mean square over channels of what sampling alone keeps between running mean and
        population, in standard deviations; it shrinks with the images of a batch and with momentum.
    ``share_beyond_3``, ``max_abs_z``, ``max_abs_z_channel``: of the running mean before the step against the mean of
        the batch, in standard errors of their difference, if weights stood still; with few images brought to the
        scale of a normal deviate (`syncbn.monitor.normal_score`). A layer that is not synchronized is judged by the
        batches of rank 0, whose statistics are the ones that are usually saved.
    ``buffers_equal``: whether all ranks hold the same running statistics after the step, to the last bit.
    ``num_dead`` ...: counts of `ChannelStates`; ``dead`` ... name the first 32 channels.
    What is not known is NaN: the first five numbers without two images, over all ranks, to compare.
    """

    layer: str
    num_channels: int
    num_images: int
    positions_per_image: int
    design_effect: float
    mean_shift_noise: float
    share_beyond_3: float
    max_abs_z: float
    max_abs_z_channel: int
    buffers_equal: bool
    num_dead: int
    num_collapsed: int
    num_exploding: int
    num_muted: int
    dead: tuple[int, ...] = ()
    collapsed: tuple[int, ...] = ()
    exploding: tuple[int, ...] = ()
    muted: tuple[int, ...] = ()


@dataclass(frozen=True)
class BatchNormSample:
    """One training step; layers in the order in which they ran. Equal on all ranks.

    ``step``: how many steps there were, this one included.
    ``ranks``: one finding for each rank, see `syncbn.monitor.RankDoctor`; empty with one rank or too few samples.
    ``repeating_ranks``: ranks whose batches hold nothing but one image over and over.
    ``differing_ranks``: by synchronized layer the ranks whose running statistics differ from those of most; all of
        them where no statistics are those of most. Layers where none differ are left out.
    ``not_compared``: layers in which ranks are not compared, because a layer before them is not synchronized: what
        reaches them differs by rank even if the data does not.
    ``idle``: layers that did not run in training mode: frozen, left out of the step, or inside compiled code.
    """

    step: int
    layers: tuple[LayerSample, ...]
    ranks: tuple[RankFinding, ...] = ()
    repeating_ranks: tuple[int, ...] = ()
    differing_ranks: Mapping[str, tuple[int, ...]] | None = None
    not_compared: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()


def layer_sample(
    path: str,
    layer: _BatchNorm,
    ranks: Sequence[Heard],
    pooled: ImageMoments,
    *,
    is_synchronized: bool,
    states: ChannelStates,
) -> LayerSample:
    """The numbers of one layer that was fed ``pooled`` on all ``ranks`` together, at least one image."""
    source = ranks[0] if not is_synchronized else next(rank for rank in ranks if rank.num_calls > 0)
    batch = pooled if is_synchronized else source.moments
    usable = ~(states.collapsed | states.exploding)
    update_noise = _update_noise(layer.momentum, int(source.num_batches)) * source.num_updates.clamp(min=1)
    error = (batch.between_var * (1 + update_noise) / batch.num_images).sqrt()
    z = normal_score((batch.mean - source.running_mean) / error, batch.num_images - 1)[usable].abs()
    noise = (batch.between_var * update_noise / (batch.num_images * batch.var))[usable]
    channels = usable.nonzero().flatten()
    return LayerSample(
        layer=path,
        num_channels=layer.num_features,
        num_images=int(pooled.num_images),
        positions_per_image=round(float(pooled.positions)),
        design_effect=float(design_effect(pooled)[usable].nanmedian()) if len(z) else torch.nan,
        mean_shift_noise=float(noise.mean().sqrt()),
        share_beyond_3=_share_beyond(z, 3.0),
        max_abs_z=float(z.max()) if len(z) else torch.nan,
        max_abs_z_channel=int(channels[z.argmax()]) if len(z) else 0,
        buffers_equal=all(bool(rank.digest == ranks[0].digest) for rank in ranks),
        num_dead=int(states.dead.sum()),
        num_collapsed=int(states.collapsed.sum()),
        num_exploding=int(states.exploding.sum()),
        num_muted=int(states.muted.sum()),
        dead=_named(states.dead),
        collapsed=_named(states.collapsed),
        exploding=_named(states.exploding),
        muted=_named(states.muted),
    )


def _update_noise(momentum: float | None, num_batches: int) -> float:
    """Variance of a running mean over that of a batch mean: the squared weights of all batches so far, added up."""
    batches = effective_batches(momentum, num_batches)
    return (1 - initial_weight(momentum, num_batches) ** 2) / batches if batches else torch.inf


def _share_beyond(z: Tensor, limit: float) -> float:
    return float((z > limit).double().mean()) if z.isfinite().all() else torch.nan


def _named(channels: Tensor) -> tuple[int, ...]:
    return tuple(channels.nonzero().flatten()[:MAX_NAMED].tolist())
