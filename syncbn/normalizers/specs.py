"""Which member of the family to put in a BatchNorm's place: small values, each able to build its layer.

What a BatchNorm learned goes over wherever the member has a place for it: ``weight`` and ``bias`` are the very
same parameters, so that an optimizer made before goes on. ``eps`` is the BatchNorm's.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.normalizers.frozen import FrozenBatchNorm
from syncbn.normalizers.ghost import GhostBatchNorm
from syncbn.normalizers.instance import InstanceNorm
from syncbn.normalizers.rms import ChannelRMSNorm


class Normalizer(Protocol):
    """What `replace_batchnorm` asks for a stand-in."""

    def build(self, path: str, batchnorm: _BatchNorm) -> nn.Module:
        """A stand-in for ``batchnorm``, which is left as it is.

        Raises:
            ValueError: naming ``path`` and what to do, if there is none.
        """
        ...


@dataclass(frozen=True)
class GroupNormalizer:
    """`torch.nn.GroupNorm` (Wu and He 2018) over ``*`` and the channels of a group, for each sample.

    Exactly one of ``num_groups`` and ``channels_per_group`` is given; 1 and ``C`` groups are LayerNorm and
    InstanceNorm. The paper's default is 32 groups.
    """

    num_groups: int | None = None
    channels_per_group: int | None = None

    def __post_init__(self) -> None:
        given = [count for count in (self.num_groups, self.channels_per_group) if count is not None]
        if len(given) != 1 or given[0] < 1:
            raise ValueError(f"give one of num_groups and channels_per_group, at least 1; got {self}")

    def build(self, path: str, batchnorm: _BatchNorm) -> nn.Module:
        """A GroupNorm with the same weight and bias; see `Normalizer.build`."""
        num_channels = batchnorm.num_features
        return _group_norm(self._num_groups(path, num_channels), batchnorm)

    def _num_groups(self, path: str, num_channels: int) -> int:
        name = "num_groups" if self.num_groups is not None else "channels_per_group"
        count = self.num_groups or self.channels_per_group
        assert count is not None
        if num_channels % count:
            nearest = " or ".join(str(divisor) for divisor in _nearest_divisors(num_channels, count))
            raise ValueError(
                f"{path} has {num_channels} channels, which {name}={count} does not divide; "
                f"the nearest {name} that do: {nearest}"
            )
        return count if self.num_groups is not None else num_channels // count


@dataclass(frozen=True)
class LayerNormalizer:
    """LayerNorm (Ba, Kiros and Hinton 2016) over ``(C, *)`` of each sample: `torch.nn.GroupNorm` with one group.

    `torch.nn.LayerNorm((C, *))` takes the same statistics, but has to know the sizes of ``*``, and learns a weight
    and a bias for every element. This one works for any size and, as BatchNorm, learns one of each for a channel.
    """

    def build(self, path: str, batchnorm: _BatchNorm) -> nn.Module:
        """A GroupNorm of one group with the same weight and bias; see `Normalizer.build`."""
        return _group_norm(1, batchnorm)


@dataclass(frozen=True)
class InstanceNormalizer:
    """`InstanceNorm` (Ulyanov, Vedaldi and Lempitsky 2016) over ``*`` of each sample and channel.

    With ``track_running_stats`` it starts statistics of its own: the variance inside a sample is not BatchNorm's.
    """

    track_running_stats: bool = False

    def build(self, path: str, batchnorm: _BatchNorm) -> nn.Module:
        """An InstanceNorm with the same weight and bias; see `Normalizer.build`."""
        if self.track_running_stats and batchnorm.momentum is None:
            raise ValueError(
                f"{path} has momentum=None, a mean over all batches, which torch's instance norm does not know; "
                "set a momentum, or do without track_running_stats"
            )
        layer = InstanceNorm(
            batchnorm.num_features,
            batchnorm.eps,
            0.0 if batchnorm.momentum is None else batchnorm.momentum,
            affine=batchnorm.weight is not None,
            track_running_stats=self.track_running_stats,
            **_placement(batchnorm),
        )
        return _with_parameters_of(batchnorm, layer)


@dataclass(frozen=True)
class RMSNormalizer:
    """`ChannelRMSNorm` (Zhang and Sennrich 2019) over ``C`` of each sample and position; it has no bias."""

    def build(self, path: str, batchnorm: _BatchNorm) -> nn.Module:
        """A ChannelRMSNorm with the same weight; see `Normalizer.build`."""
        affine = batchnorm.weight is not None
        layer = ChannelRMSNorm(batchnorm.num_features, batchnorm.eps, affine, **_placement(batchnorm))
        layer.weight = batchnorm.weight
        return layer


@dataclass(frozen=True)
class FrozenNormalizer:
    """`FrozenBatchNorm`: the affine map that the BatchNorm is in evaluation, fixed from now on."""

    def build(self, path: str, batchnorm: _BatchNorm) -> nn.Module:
        """A FrozenBatchNorm with the same statistics, weight and bias by value; see `Normalizer.build`."""
        if batchnorm.running_mean is None or batchnorm.running_var is None:
            raise ValueError(
                f"{path} keeps no running statistics that could be frozen; "
                "build it with track_running_stats=True and train it first"
            )
        layer = FrozenBatchNorm(batchnorm.num_features, batchnorm.eps, affine=False)
        for name, parameter in batchnorm.named_parameters(recurse=False):
            # Copied, for an optimizer may still hold the parameter.
            layer._buffers[name] = parameter.detach().clone()
        layer._buffers.update(batchnorm._buffers)
        return layer


@dataclass(frozen=True)
class GhostNormalizer:
    """`GhostBatchNorm` (Hoffer, Hubara and Soudry 2017): statistics of every ``virtual_batch_size`` samples.

    It goes on with the BatchNorm's running statistics, in the same tensors: once restored, the BatchNorm has them
    as they were trained meanwhile. A SyncBatchNorm no longer synchronizes.
    """

    virtual_batch_size: int

    def __post_init__(self) -> None:
        if self.virtual_batch_size < 1:
            raise ValueError(f"virtual_batch_size must be at least 1, got {self.virtual_batch_size}")

    def build(self, path: str, batchnorm: _BatchNorm) -> nn.Module:
        """A GhostBatchNorm with the same parameters and buffers; see `Normalizer.build`."""
        layer = GhostBatchNorm(
            batchnorm.num_features,
            self.virtual_batch_size,
            batchnorm.eps,
            batchnorm.momentum,
            affine=batchnorm.weight is not None,
            track_running_stats=batchnorm.track_running_stats,
            **_placement(batchnorm),
        )
        layer._buffers.update(batchnorm._buffers)
        return _with_parameters_of(batchnorm, layer)


def _group_norm(num_groups: int, batchnorm: _BatchNorm) -> nn.Module:
    affine = batchnorm.weight is not None
    layer = nn.GroupNorm(num_groups, batchnorm.num_features, batchnorm.eps, affine, **_placement(batchnorm))
    return _with_parameters_of(batchnorm, layer)


def _with_parameters_of(batchnorm: _BatchNorm, layer: nn.Module) -> nn.Module:
    layer._parameters.update(batchnorm._parameters)
    return layer


def _placement(batchnorm: _BatchNorm) -> dict[str, Any]:
    """Device and type of the layer's parameters, or else of its statistics; nothing if it has neither."""
    tensor = batchnorm.running_mean if batchnorm.weight is None else batchnorm.weight
    return {} if tensor is None else {"device": tensor.device, "dtype": tensor.dtype}


def _nearest_divisors(number: int, count: int) -> list[int]:
    """The largest divisor of ``number`` below ``count`` and the smallest above, if there is one."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    below = [divisor for divisor in divisors if divisor < count]
    above = [divisor for divisor in divisors if divisor > count]
    return below[-1:] + above[:1]
