"""The yardstick of the layer's tests: torch's own BatchNorm in float64, in one process that holds the joined batch."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn import SyncBatchNorm
from tests.ranks import run_ranks

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Absolute and relative, for values and gradients of order 1."""


@dataclass(frozen=True)
class Case:
    """Batches for a layer; rank r gets ``sizes[r]`` rows of each of ``num_steps`` batches."""

    sizes: tuple[int, ...]
    shape: tuple[int, ...] = (6, 4, 5)
    """Of one row: channels first."""
    dtype: torch.dtype = torch.float64
    momentum: float | None = 0.1
    affine: bool = True
    channels_last: bool = False
    num_steps: int = 2
    mean: float = 1.0
    std: float = 3.0

    @property
    def world_size(self) -> int:
        return len(self.sizes)

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]

    @property
    def sum_scale(self) -> float:
        """The size of a sum over a channel of terms of order 1 and either sign, over all steps."""
        return math.sqrt(self.num_steps * sum(self.sizes) * math.prod(self.shape[1:]))

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Joined inputs, with the gradients of their outputs; rows differ in spread."""
        generator = torch.Generator().manual_seed(20150212)
        shape = (self.num_steps, 2, sum(self.sizes), *self.shape)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        spread = torch.linspace(0.2, 1.0, max(sum(self.sizes), 1), dtype=torch.float64)
        values = values * spread.view(-1, *[1] * len(self.shape))
        return [((x * self.std + self.mean).to(self.dtype), dy.to(self.dtype)) for x, dy in values]

    def shard(self, joined: Tensor, rank: int) -> Tensor:
        """The rows of ``rank``."""
        rows = torch.split(joined, list(self.sizes))[rank].clone()
        return rows.to(memory_format=torch.channels_last) if self.channels_last else rows


@dataclass(frozen=True)
class Trained:
    """What came out: by step outputs and input gradients, and summed over steps the parameters' gradients."""

    outputs: list[Tensor]
    input_grads: list[Tensor]
    weight_grad: Tensor | None
    bias_grad: Tensor | None
    buffers: dict[str, Tensor]


LayerFactory = Callable[[Case], nn.Module]


def sync_layer(case: Case) -> nn.Module:
    """The layer under test."""
    return SyncBatchNorm(case.shape[0], momentum=case.momentum, affine=case.affine, dtype=case.dtype)


def train(layer: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Trained:
    """Forward and backward of every batch, without optimizer steps between."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.linspace(0.5, 2.0, parameter.numel()))
    outputs, input_grads = [], []
    for x, dy in batches:
        x.requires_grad_()
        y = layer(x)
        y.backward(dy)
        assert x.grad is not None
        outputs.append(y.detach())
        input_grads.append(x.grad)
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return Trained(outputs, input_grads, grads.get("weight"), grads.get("bias"), dict(layer.named_buffers()))


def train_shard(case: Case, make_layer: LayerFactory) -> Trained:
    """What one rank makes of its rows."""
    rank = dist.get_rank()
    batches = [(case.shard(x, rank), case.shard(dy, rank)) for x, dy in case.batches()]
    return train(make_layer(case), batches)


def train_joined(case: Case) -> Trained:
    """What one process makes of all rows, in float64."""
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(case.shape)]
    layer = kind(case.shape[0], momentum=case.momentum, affine=case.affine, dtype=torch.float64)
    return train(layer, [(x.double(), dy.double()) for x, dy in case.batches()])


def check_equals_joined(case: Case, make_layer: LayerFactory = sync_layer) -> None:
    """Outputs, gradients and buffers of ranks are those of one process; raises AssertionError naming what is not."""
    ranks = run_ranks(case.world_size, train_shard, case, make_layer)
    joined = train_joined(case)
    for step in range(case.num_steps):
        _check(case, "output", torch.cat([rank.outputs[step] for rank in ranks]), joined.outputs[step])
        _check(case, "input gradient", torch.cat([rank.input_grads[step] for rank in ranks]), joined.input_grads[step])
    if joined.weight_grad is not None and joined.bias_grad is not None:
        _check(case, "weight gradient", _sum([rank.weight_grad for rank in ranks]), joined.weight_grad, case.sum_scale)
        _check(case, "bias gradient", _sum([rank.bias_grad for rank in ranks]), joined.bias_grad, case.sum_scale)
    for name, buffer in joined.buffers.items():
        for rank in ranks:
            assert torch.equal(rank.buffers[name], ranks[0].buffers[name]), f"{name} differs between ranks"
        _check(case, name, ranks[0].buffers[name], buffer)


def _sum(grads: list[Tensor | None]) -> Tensor:
    return torch.stack([grad for grad in grads if grad is not None]).sum(0)


def _check(case: Case, name: str, actual: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    error = ((actual.double() - expected).abs() / (scale + expected.abs())).max()
    assert error <= case.tolerance, f"{name} is off by {error:.2e}, more than {case.tolerance:.0e}"
