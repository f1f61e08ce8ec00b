"""The family of normalizers: what may stand in for BatchNorm, and the way there and back.

Each subtracts a mean and divides by a deviation (RMSNorm: only divides), both taken over some axes of the input
``(N, C, *)``, and then scales and shifts every channel. They differ in the axes, that is, in whose values a value is
compared with:

============  ==================================  ==========================  ====================================
member        statistics over                     in evaluation               source
============  ==================================  ==========================  ====================================
BatchNorm     ``(N, *)`` for each channel         running statistics          Ioffe and Szegedy 2015
GhostBatch    the same, of each virtual batch     running statistics          Hoffer, Hubara and Soudry 2017
FrozenBatch   nothing: running statistics         as in training              fixed BatchNorm, an affine map
LayerNorm     ``(C, *)`` of each sample           as in training              Ba, Kiros and Hinton 2016
InstanceNorm  ``*`` of each sample and channel    as in training, or running  Ulyanov, Vedaldi and Lempitsky 2016
GroupNorm     ``*`` and the channels of a group   as in training              Wu and He 2018
RMSNorm       ``C`` of each sample and position   as in training              Zhang and Sennrich 2019
============  ==================================  ==========================  ====================================

BatchNorm is often said to normalize "along N". That holds for inputs ``(N, C)`` only; for images its axes are
``(N, H, W)``. Of the family only BatchNorm and ghost batch norm, while they train, let a sample's output depend on
the other samples of its batch.
"""

from syncbn.normalizers.frozen import FrozenBatchNorm
from syncbn.normalizers.ghost import GhostBatchNorm
from syncbn.normalizers.instance import InstanceNorm
from syncbn.normalizers.rms import ChannelRMSNorm
from syncbn.normalizers.specs import (
    FrozenNormalizer,
    GhostNormalizer,
    GroupNormalizer,
    InstanceNormalizer,
    LayerNormalizer,
    Normalizer,
    RMSNormalizer,
)
from syncbn.normalizers.swap import replace_batchnorm, restore_batchnorm

__all__ = [
    "ChannelRMSNorm",
    "FrozenBatchNorm",
    "FrozenNormalizer",
    "GhostBatchNorm",
    "GhostNormalizer",
    "GroupNormalizer",
    "InstanceNorm",
    "InstanceNormalizer",
    "LayerNormalizer",
    "Normalizer",
    "RMSNormalizer",
    "replace_batchnorm",
    "restore_batchnorm",
]
