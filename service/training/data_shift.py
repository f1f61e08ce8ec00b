"""Whether validation images look different from training images to the first BatchNorm layer of a model.

A network that learns its training images by heart must not pass for one that is shown other images. So the first layer
alone is asked; what reaches it has also passed through no BatchNorm, so that no mode and no running statistic has a
share in it. And where it is fully connected, of variances only those count that are larger on validation images:
weights that grow out of single training images answer to these more strongly than to new ones.

Measured on perceptrons with 784 inputs that learned 40 to 300 images of Fashion-MNIST, 40 % of the labels wrong:
validation images varied less by up to 0.36 nats to the second layer and by up to 0.33 to the first, some of it beyond
chance at 0.1 %; no mean of the first moved beyond chance. A first convolution, whose weights meet many positions of
each image, showed nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from service.jobs import DataShift
from service.training.population import Population, empty_moments, over_ranks
from syncbn.drift import ImageMoments, LayerShift, image_moments, measure_shift
from syncbn.layers import tracked_layers

LEVEL = 0.001
"""How often chance alone may pass for other data at one look: one of a hundred runs that look ten times."""
SIZE = 0.1
"""From how many standard deviations (rms over channels), or nats of variance (mean), a shift matters."""
MIN_IMAGES = 32
"""With fewer, of training or of validation, variances cannot be told from chance, and nothing is said to move."""
_ITSELF = ""  # the path of a layer in itself


@contextmanager
def seen_by_first_layer(model: nn.Module, population: Population) -> Iterator[dict[str, ImageMoments]]:
    """Inside the block, what this rank feeds the first layer of ``population``; to be given to `measure_data_shift`.

    No collective. Cost: about two passes over the input of that layer.
    """
    first = _first_layer(model, population)
    if first is None:
        yield {}
        return
    with image_moments(first[1]) as seen:
        yield seen


def measure_data_shift(model: nn.Module, population: Population, seen: dict[str, ImageMoments]) -> DataShift | None:
    """How what all ranks have ``seen`` of validation images differs from the population's images.

    The same on every rank; None for a model without BatchNorm that keeps statistics. One exchange of ``7C + 3``
    doubles; all ranks must call, also those without validation images.
    """
    first = _first_layer(model, population)
    if first is None:
        return None
    path, layer = first
    own = seen.get(_ITSELF) or empty_moments(layer)
    train, other = population.images[path], over_ranks({path: own}, "moments of validation images")[path]
    (shift,) = measure_shift({path: train}, {path: other}, eps=layer.eps)
    channel = shift.max_mean_shift_channel
    enough = min(train.num_images.item(), other.num_images.item()) >= MIN_IMAGES
    return DataShift(
        **asdict(shift),
        max_mean_shift_is_higher=bool(other.mean[channel] > train.mean[channel]),
        moved=enough and _moved(shift, is_convolved=bool(train.positions > 1)),
    )


def _moved(shift: LayerShift, *, is_convolved: bool) -> bool:
    """Beyond chance and in size, by means or by variances."""
    var_size = shift.mean_abs_log_var_ratio if is_convolved else shift.mean_log_var_ratio
    return (shift.mean_p < LEVEL and shift.rms_mean_shift >= SIZE) or (shift.var_p < LEVEL and var_size >= SIZE)


def _first_layer(model: nn.Module, population: Population) -> tuple[str, _BatchNorm] | None:
    """In order of execution, with its path."""
    path = next(iter(population.images), None)
    return None if path is None else (path, tracked_layers(model)[path])
