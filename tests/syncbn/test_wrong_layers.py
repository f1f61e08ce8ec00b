"""Layers that are wrong in ways that have shipped elsewhere; the yardstick must reject each of them."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from syncbn import SyncBatchNorm
from tests.syncbn.joined import Case, check_equals_joined
from tests.syncbn.summed import summed

UNEVEN = Case((6, 2))
EMPTY = Case((3, 0))
FAR = Case((6, 2), dtype=torch.float32, mean=200.0)


class Composed(nn.BatchNorm2d):
    """The right layer, composed of plain operators; the wrong ones differ from it in one method each."""

    def forward(self, input: Tensor) -> Tensor:
        count, mean, var = self.moments(input)
        self.track(input, count, mean.detach(), var.detach())
        shape = (1, -1, 1, 1)
        x_hat = (input - mean.view(shape)) / (var.view(shape) + self.eps).sqrt()
        return x_hat * self.weight.view(shape) + self.bias.view(shape)

    def moments(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = summed(torch.tensor(input.numel() / input.size(1), dtype=input.dtype))
        mean = summed(input.sum((0, 2, 3))) / count
        return count, mean, summed((input - mean.view(1, -1, 1, 1)).square().sum((0, 2, 3))) / count

    def track(self, input: Tensor, count: Tensor, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, 0.1)
        self.running_var.lerp_(var * self.correction(input, count), 0.1)

    def correction(self, input: Tensor, count: Tensor) -> Tensor:
        return count / (count - 1)


class EqualWeights(Composed):
    """Averages the ranks' means and variances as if their batches were equal."""

    def moments(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = summed(torch.tensor(input.numel() / input.size(1), dtype=input.dtype))
        mean = summed(input.mean((0, 2, 3))) / dist.get_world_size()
        square = summed(input.square().mean((0, 2, 3))) / dist.get_world_size()
        return count, mean, square - mean.square()


class LocalBessel(Composed):
    """Corrects the running variance by the rank's own count."""

    def correction(self, input: Tensor, count: Tensor) -> Tensor:
        own = torch.tensor(input.numel() / input.size(1), dtype=input.dtype)
        return own / (own - 1)


class Biased(Composed):
    """Tracks the biased variance."""

    def correction(self, input: Tensor, count: Tensor) -> Tensor:
        return torch.ones_like(count)


class NoBackward(Composed):
    """Lets no gradient through the statistics of other ranks."""

    def moments(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count, mean, var = super().moments(input)
        return count, mean.detach(), var.detach()


class NotSynchronized(Composed):
    """Normalizes by the rank's own batch."""

    def moments(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        var, mean = torch.var_mean(input, (0, 2, 3), correction=0)
        return torch.tensor(input.numel() / input.size(1), dtype=input.dtype), mean, var


class UnitEps(Composed):
    """Adds eps to the deviation, not to the variance."""

    def moments(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count, mean, var = super().moments(input)
        return count, mean, (var.sqrt() + self.eps).square() - self.eps


class EqualWeightsBackward(Composed):
    """Divides the gradient that comes through the statistics as if all ranks had as many values as this one."""

    def moments(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = input.numel() / input.size(1)
        ratio = (summed(torch.tensor(own, dtype=input.dtype)) / (own * dist.get_world_size())).item()
        return super().moments(input.detach() + (input - input.detach()) * ratio)


class SummedParameters(Composed):
    """Adds the parameters' gradients up over ranks, which DistributedDataParallel then averages."""

    def forward(self, input: Tensor) -> Tensor:
        count, mean, var = self.moments(input)
        self.track(input, count, mean.detach(), var.detach())
        weight, bias = (part.detach() + summed(part - part.detach()) for part in (self.weight, self.bias))
        x_hat = (input - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + self.eps).sqrt()
        return x_hat * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


class NaiveVariance(Composed):
    """Takes the variance for the mean square less the square of the mean, in the type of the input."""

    def moments(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = summed(torch.tensor(input.numel() / input.size(1), dtype=input.dtype))
        mean = summed(input.sum((0, 2, 3))) / count
        return count, mean, summed(input.square().sum((0, 2, 3))) / count - mean.square()


class EmptyCounts(Composed):
    """Counts a rank without samples as if it had one."""

    def moments(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, mean, var = super().moments(input)
        own = max(input.numel() / input.size(1), 1)
        return summed(torch.tensor(own, dtype=input.dtype)), mean, var


class RecomputedTwice(Composed):
    """Counts the recomputation of activation checkpointing as another batch."""

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = checkpoint(super().forward, input, use_reentrant=False)
        return output


class Recomputed(SyncBatchNorm):
    """The layer under test, checkpointed likewise."""

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        output: Tensor = checkpoint(super().forward, input, use_reentrant=False)
        return output


def _make(kind: type[Composed] | type[Recomputed], case: Case) -> nn.Module:
    return kind(case.shape[0], dtype=case.dtype)


class Factory:
    """Makes layers of one class; a function of a module would need one name for each."""

    def __init__(self, kind: type[Composed] | type[Recomputed]) -> None:
        self.kind = kind

    def __call__(self, case: Case) -> nn.Module:
        return _make(self.kind, case)


CASES = pytest.mark.parametrize(
    ("kind", "case"),
    [(Composed, UNEVEN), (Composed, EMPTY), (Recomputed, UNEVEN), (Recomputed, FAR)],
    ids=["composed", "composed-empty", "ours-recomputed", "ours-far"],
)


@CASES
def test_a_right_layer_passes(kind: type[Composed] | type[Recomputed], case: Case) -> None:
    check_equals_joined(case, Factory(kind))


@pytest.mark.parametrize(
    ("kind", "case", "symptom"),
    [
        (EqualWeights, UNEVEN, "output is off"),
        (LocalBessel, UNEVEN, "running_var differs between ranks"),
        (Biased, UNEVEN, "running_var is off"),
        (NoBackward, UNEVEN, "input gradient is off"),
        (EqualWeightsBackward, UNEVEN, "input gradient is off"),
        (SummedParameters, UNEVEN, "weight gradient is off"),
        (NotSynchronized, UNEVEN, "output is off"),
        (UnitEps, UNEVEN, "output is off"),
        (EmptyCounts, EMPTY, "running_var is off"),
        (NaiveVariance, FAR, "output is off"),
        (RecomputedTwice, UNEVEN, "running_mean is off"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_wrong_layer_is_rejected_by_what_it_gets_wrong(kind: type[Composed], case: Case, symptom: str) -> None:
    check: Callable[..., None] = check_equals_joined
    with pytest.raises(AssertionError, match=symptom):
        check(case, Factory(kind))
