"""Activation checkpointing: statistics count once, values are the same, and only what must be is exchanged again."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from syncbn import SyncBatchNorm
from tests.ranks import run_ranks
from tests.syncbn.collectives import CollectiveLog

Forward = Callable[[nn.Module, Tensor], Tensor]


class Twice(nn.Module):
    """A layer that runs twice, and one that runs once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.shared = SyncBatchNorm(3, momentum=None)
        self.linear = nn.Conv1d(3, 3, 1)
        self.once = SyncBatchNorm(3)
        self.double()

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.once(self.linear(self.shared(self.shared(input).sin() * 2 + 1)))
        return output.tanh()


def plain(model: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = model(x)
    return output


def reentrant(model: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = checkpoint(model, x, use_reentrant=True)
    return output


def non_reentrant(model: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = checkpoint(model, x, use_reentrant=False)
    return output


def nested(model: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = checkpoint(non_reentrant, model, x, use_reentrant=False)
    return output


def nested_reentrant(model: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = checkpoint(reentrant, model, x, use_reentrant=True)
    return output


def _run_after_non_reentrant(model: nn.Module, x: Tensor) -> Tensor:
    return plain(model, non_reentrant(model, x) * 2)


def non_reentrant_in_reentrant(model: nn.Module, x: Tensor) -> Tensor:
    """Without gradients, as in its first run, the inner segment has no frame."""
    output: Tensor = checkpoint(_run_after_non_reentrant, model, x, use_reentrant=True)
    return output


def _run_after_reentrant(model: nn.Module, x: Tensor) -> Tensor:
    return plain(model, reentrant(model, x) * 2)


def reentrant_in_non_reentrant(model: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = checkpoint(_run_after_reentrant, model, x, use_reentrant=False)
    return output


def nested_first(model: nn.Module, x: Tensor) -> Tensor:
    """The outer recomputation runs the inner segment as if for the first time."""
    output: Tensor = checkpoint(_run_after_non_reentrant, model, x, use_reentrant=False)
    return output


def two_segments(model: nn.Module, x: Tensor) -> Tensor:
    """The same layers in two segments, which are recomputed last to first."""
    return non_reentrant(model, non_reentrant(model, x) * 2)


def two_reentrant_segments(model: nn.Module, x: Tensor) -> Tensor:
    return reentrant(model, reentrant(model, x) * 2)


def two_plain_segments(model: nn.Module, x: Tensor) -> Tensor:
    return plain(model, plain(model, x) * 2)


def _values(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def _train(forward: Forward, sizes: tuple[int, ...]) -> tuple[list[Tensor], int, int]:
    """Gradients and buffers after a step, and the collectives of its forward and backward."""
    x = torch.split(_values((sum(sizes), 3, 4)), list(sizes))[dist.get_rank()].clone().requires_grad_()
    model = Twice()
    with CollectiveLog() as forwards:
        y = forward(model, x)
    with CollectiveLog() as backwards:
        torch.autograd.backward(y.pow(3).sum())
    grads = [tensor.grad for tensor in (x, *model.parameters()) if tensor.grad is not None]
    return grads + list(model.buffers()), len(forwards.collectives), len(backwards.collectives)


@pytest.mark.parametrize(
    ("forward", "reference", "num_again"),
    [
        (non_reentrant, plain, 0),
        (two_segments, two_plain_segments, 0),
        (nested, plain, 0),
        (nested_first, two_plain_segments, 3),
        (reentrant, plain, 0),
        (two_reentrant_segments, two_plain_segments, 0),
        (nested_reentrant, plain, 0),
        (non_reentrant_in_reentrant, two_plain_segments, 0),
        (reentrant_in_non_reentrant, two_plain_segments, 0),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_checkpointing_counts_once_and_exchanges_again_only_where_it_must(
    forward: Forward, reference: Forward, num_again: int
) -> None:
    sizes = (3, 0, 2)
    expected = run_ranks(3, _train, reference, sizes)
    for actual, plainly in zip(run_ranks(3, _train, forward, sizes), expected, strict=True):
        assert len(actual[0]) == len(plainly[0])
        for value, wanted in zip(actual[0], plainly[0], strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
        assert actual[1] == plainly[1]
        assert actual[2] == plainly[2] + num_again


def _run_backward_twice() -> tuple[bool, int]:
    model, x = Twice(), _values((4, 3, 4)).requires_grad_()
    loss = non_reentrant(model, x).pow(3).sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    with CollectiveLog() as log:
        (second,) = torch.autograd.grad(loss, x)
    return torch.equal(first, second), len(log.collectives)


def test_a_graph_that_is_kept_is_recomputed_from_what_was_exchanged_each_time() -> None:
    assert run_ranks(2, _run_backward_twice) == [(True, 3)] * 2


@pytest.mark.parametrize("forward", [reentrant, non_reentrant])
def test_a_process_alone_counts_once_and_recomputes_the_same_bits(forward: Forward) -> None:
    results = []
    for run in (plain, forward):
        model, x = Twice(), _values((4, 3, 4)).requires_grad_()
        torch.autograd.backward(run(model, x).pow(3).sum())
        results.append([x.grad, *(parameter.grad for parameter in model.parameters()), *model.buffers()])
    for actual, expected in zip(*results, strict=True):
        assert actual is not None
        assert expected is not None
        assert torch.equal(actual, expected)
