"""From the model a spec names to the module that trains."""

import math
from collections.abc import Sequence

from torch import nn

from service.jobs import Mlp, ResNet20
from service.training import resnet
from service.training.mlp import mlp


def build_model(model: Mlp | ResNet20, sample_shape: Sequence[int], num_classes: int, bn_momentum: float) -> nn.Module:
    """The module for samples of ``sample_shape = (C, H, W)``, on the CPU in float32, with torch's own BatchNorm.

    The first weights come from torch's global generator: seed it alike on every rank. ``bn_momentum`` is the
    weight of the new batch in the running statistics, as torch counts it.
    """
    if isinstance(model, Mlp):
        return mlp(math.prod(sample_shape), model.hidden_sizes, num_classes, bn_momentum)
    return resnet.ResNet20(sample_shape[0], num_classes, model.width, bn_momentum)
