"""What stands for the population of a run: moments of what each BatchNorm layer is fed, and of its single images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn import BatchMoments, population_statistics
from syncbn.agreement import Exchange
from syncbn.drift import ImageMoments, image_moments
from syncbn.exchange import gather_over_ranks, peers
from syncbn.layers import running_moments, tracked_layers


@dataclass(frozen=True, eq=False)
class Population:
    """By layer path, in the order of execution; the same on every rank.

    ``moments`` are what running statistics are held against. ``images`` are of the same values, and also know how
    much single images differ: by that it is judged what chance alone makes of a difference.
    """

    moments: dict[str, BatchMoments]
    images: dict[str, ImageMoments]


@torch.no_grad()
def measure_population(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> Population:
    """The population as the ``batches`` of images (and labels) of all ranks show it to ``model``, which is left alone.

    One forward pass and two exchanges; all ranks must call, also those without batches.
    """
    with image_moments(model) as seen:
        moments = population_statistics(model, batches)
    layers = tracked_layers(model).items()
    own = {path: seen.get(path) or empty_moments(layer) for path, layer in layers}
    together = over_ranks(own, "moments of population images")
    return Population(moments, {path: together[path] for path in moments})


def over_ranks(own: dict[str, ImageMoments], purpose: str) -> dict[str, ImageMoments]:
    """What all ranks saw, by layer: merged in the order of ranks, so that all get the same bits.

    One exchange, which errors call by its ``purpose``; all ranks must call with the same layers, also who saw nothing
    and brings `ImageMoments.empty`.
    """
    group = peers(None)
    if group is None or not own:
        return own
    packed = [moments.pack() for moments in own.values()]
    vector = torch.cat(packed)
    rows = gather_over_ranks(vector, group, Exchange(purpose, num_values=vector.numel()))
    first, *others = [torch.split(row, [part.numel() for part in packed]) for row in rows]
    together = dict(zip(own, map(ImageMoments.unpack, first), strict=True))
    for parts in others:
        for path, part in zip(own, parts, strict=True):
            together[path] = together[path].merge(ImageMoments.unpack(part))
    return together


def empty_moments(layer: _BatchNorm) -> ImageMoments:
    """What ``layer`` is fed by a rank without images."""
    return ImageMoments.empty(layer.num_features, running_moments(layer)[0].device)
