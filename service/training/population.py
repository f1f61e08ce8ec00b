"""What stands for the population of a run: moments of what each BatchNorm layer is fed, and of its single images."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from syncbn import BatchMoments, population_statistics
from syncbn.agreement import Exchange
from syncbn.drift import ImageMoments
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
    with _image_moments(model) as seen:
        moments = population_statistics(model, batches)
    together = _over_ranks(seen)
    return Population(moments, {path: together[path] for path in moments})


@contextmanager
def _image_moments(model: nn.Module) -> Iterator[dict[str, ImageMoments]]:
    """Inside, every input of every layer is added to what is yielded."""
    layers = tracked_layers(model)
    seen = {
        path: ImageMoments.empty(layer.num_features, running_moments(layer)[0].device) for path, layer in layers.items()
    }

    def note(path: str, _layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[path] = seen[path].merge(ImageMoments.of(args[0]))

    with ExitStack() as stack:
        for path, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(partial(note, path)).remove)
        yield seen


def _over_ranks(seen: dict[str, ImageMoments]) -> dict[str, ImageMoments]:
    """Merged in the order of ranks, so that all get the same bits."""
    group = peers(None)
    if group is None or not seen:
        return seen
    packed = [moments.pack() for moments in seen.values()]
    vector = torch.cat(packed)
    rows = gather_over_ranks(vector, group, Exchange("moments of population images", num_values=vector.numel()))
    first, *others = [torch.split(row, [part.numel() for part in packed]) for row in rows]
    together = dict(zip(seen, map(ImageMoments.unpack, first), strict=True))
    for parts in others:
        for path, part in zip(seen, parts, strict=True):
            together[path] = together[path].merge(ImageMoments.unpack(part))
    return together
