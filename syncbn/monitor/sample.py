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
from syncbn.monitor.layout import Layout
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
    ``differing_ranks``: by layer who holds other running statistics for no good reason. If all ranks synchronize there,
        the ranks whose statistics differ from those of most; if they synchronize with unequally many, the ranks that
        do so with another number than most. All of them where none is that of most; layers where none differ are left
        out, as are those of groups of equal size, which differ by design.
    ``not_compared``: layers in which ranks are not compared, because a layer before them is not synchronized: what
        reaches them differs by rank even if the data does not.
    ``unheard``: layers that ran in training mode, by their count of batches, but where hooks do not hear: inside
        compiled code. Nothing else is known of them.
    ``idle``: layers that did not run in training mode: frozen, or left out of the step; also inside compiled code where
        they count no batches.
    """

    step: int
    layers: tuple[LayerSample, ...]
    ranks: tuple[RankFinding, ...] = ()
    repeating_ranks: tuple[int, ...] = ()
    differing_ranks: Mapping[str, tuple[int, ...]] | None = None
    not_compared: tuple[str, ...] = ()
    unheard: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()


def layer_samples(
    layers: Mapping[str, _BatchNorm],
    layout: Layout,
    ranks: Heard,
    pooled: ImageMoments,
    states: ChannelStates,
    is_synchronized: Sequence[bool],
) -> list[LayerSample]:
    """One of each layer, fed ``pooled`` on all ranks together; all NaN where that is nothing."""
    numbers = _numbers(layers, layout, ranks, pooled, ~(states.collapsed | states.exploding), is_synchronized)
    of_states = torch.stack([states.dead, states.collapsed, states.exploding, states.muted])
    counts = layout.by_layer(of_states, False).sum(-1).T.tolist()
    are_equal = (ranks.digest == ranks.digest[0]).all(0).tolist()
    num_images = ranks.num_images.sum(0).tolist()
    positions = pooled.positions[layout.starts].tolist()
    return [
        LayerSample(
            layer=path,
            num_channels=layout.sizes[path],
            num_images=int(num_images[number]),
            positions_per_image=round(positions[number]),
            design_effect=row[0],
            mean_shift_noise=row[1],
            share_beyond_3=row[2],
            max_abs_z=row[3],
            max_abs_z_channel=int(row[4]),
            buffers_equal=are_equal[number],
            num_dead=counts[number][0],
            num_collapsed=counts[number][1],
            num_exploding=counts[number][2],
            num_muted=counts[number][3],
            **_named(of_states[:, layout.slice_of(number)]) if any(counts[number]) else {},
        )
        for number, (path, row) in enumerate(zip(layers, numbers, strict=True))
    ]


def _numbers(
    layers: Mapping[str, _BatchNorm],
    layout: Layout,
    ranks: Heard,
    pooled: ImageMoments,
    usable: Tensor,
    is_synchronized: Sequence[bool],
) -> list[list[float]]:
    """By layer: design effect, noise, share beyond 3, largest z and its channel; of ``usable`` channels, ``(C,)``."""
    synchronized = torch.tensor(is_synchronized)
    source = torch.where(synchronized, first_to_run(ranks), 0)
    every = torch.arange(len(layers))
    num_batches: list[float] = ranks.num_batches[source, every].tolist()
    update_noise = torch.tensor(
        [_update_noise(layer.momentum, int(n)) for layer, n in zip(layers.values(), num_batches, strict=True)],
        dtype=torch.float64,
    ) * ranks.num_updates[source, every].clamp(min=1)
    batch = pooled if all(is_synchronized) else _chosen(synchronized[layout.layer_of], pooled, ranks.moments(layout))
    running_mean = ranks.running_mean[source[layout.layer_of], torch.arange(layout.num_channels)]
    update_noise = update_noise[layout.layer_of]
    error = (batch.between_var * (1 + update_noise) / batch.num_images).sqrt()
    z = normal_score((batch.mean - running_mean) / error, batch.num_images - 1).abs()
    noise = batch.between_var * update_noise / (batch.num_images * batch.var)

    num_usable = layout.by_layer(usable, False).sum(-1)
    largest, channel = layout.by_layer(torch.where(usable, z, -torch.inf), -torch.inf).max(-1)
    summed = [((z > 3.0) & usable).double(), (~z.isfinite() & usable).double(), torch.where(usable, noise, 0)]
    beyond, unknown, total_noise = layout.by_layer(torch.stack(summed), 0).sum(-1)
    effects = layout.by_layer(torch.where(usable, design_effect(pooled), torch.nan), torch.nan)
    columns = [
        effects.nanmedian(-1).values,
        (total_noise / num_usable).sqrt(),
        torch.where(unknown > 0, torch.nan, beyond / num_usable),
        torch.where(num_usable > 0, largest, torch.nan),
        channel.double(),
    ]
    rows: list[list[float]] = torch.stack(columns, 1).tolist()
    return rows


def first_to_run(ranks: Heard) -> Tensor:
    """By layer the first rank where it ran, ``(L,)``; 0 if it ran on none."""
    return (ranks.num_calls > 0).int().argmax(0)


def _chosen(synchronized: Tensor, pooled: ImageMoments, ranks: ImageMoments) -> ImageMoments:
    """``pooled`` for the channels of layers that are synchronized, and those of rank 0 for the others."""
    return ImageMoments(
        torch.where(synchronized, pooled.num_images, ranks.num_images[0]),
        torch.where(synchronized, pooled.num_values, ranks.num_values[0]),
        torch.where(synchronized, pooled.num_squared, ranks.num_squared[0]),
        torch.where(synchronized, pooled.mean, ranks.mean[0]),
        torch.where(synchronized, pooled.sums, ranks.sums[:, 0]),
    )


def _update_noise(momentum: float | None, num_batches: int) -> float:
    """Variance of a running mean over that of a batch mean: the squared weights of all batches so far, added up."""
    batches = effective_batches(momentum, num_batches)
    return (1 - initial_weight(momentum, num_batches) ** 2) / batches if batches else torch.inf


def _named(states: Tensor) -> dict[str, tuple[int, ...]]:
    """The first channels of a layer in each of the states, ``(4, its channels)``."""
    names = ("dead", "collapsed", "exploding", "muted")
    return {
        name: tuple(state.nonzero().flatten()[:MAX_NAMED].tolist()) for name, state in zip(names, states, strict=True)
    }
