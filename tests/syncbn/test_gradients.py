"""Gradients across ranks, of the first and second order, against finite differences and one process."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from syncbn import SyncBatchNorm
from tests.ranks import run_ranks
from tests.syncbn.collectives import CollectiveLog
from tests.syncbn.summed import summed

SIZES = [(2, 1), (2, 0, 1), (1, 1, 0, 1)]


def _values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def _of_all_ranks(values: Tensor) -> Tensor:
    """``values``, equal on all ranks, as one thing that all of them hold: its gradient is the sum over ranks."""
    return summed(values) / dist.get_world_size()


def _normalize_joined(sizes: tuple[int, ...], joined: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The layer on ranks as a function of the joined batch, the same on every rank."""
    rank = dist.get_rank()
    layer = SyncBatchNorm(joined.size(1), dtype=torch.float64, track_running_stats=False)
    parameters = {"weight": _of_all_ranks(weight), "bias": _of_all_ranks(bias)}
    parts = list(torch.split(_of_all_ranks(joined), list(sizes)))
    own = torch.func.functional_call(layer, parameters, (parts[rank],))
    outputs = [own if place == rank else torch.zeros_like(part) for place, part in enumerate(parts)]
    return summed(torch.cat(outputs))


def _check_by_finite_differences(sizes: tuple[int, ...]) -> bool:
    inputs = (_values(sum(sizes), 2, 2) * 2 + 1, _values(2) + 2, _values(2))
    for value in inputs:
        value.requires_grad_()

    def normalize(*values: Tensor) -> Tensor:
        return _normalize_joined(sizes, *values)

    return bool(gradcheck(normalize, inputs) and gradgradcheck(normalize, inputs))


@pytest.mark.parametrize("sizes", SIZES, ids=["2", "3", "4"])
def test_gradients_and_their_gradients_are_those_of_finite_differences(sizes: tuple[int, ...]) -> None:
    assert all(run_ranks(len(sizes), _check_by_finite_differences, sizes))


def _penalized(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias for a loss with a penalty on the gradient of the input."""
    x.requires_grad_()
    loss = (layer(x).sin() * dy).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    penalty = (grad.square() * dy.cos()).sum()
    x_grad, weight_grad, bias_grad = torch.autograd.grad(loss + penalty, [x, *layer.parameters()])
    return x_grad, weight_grad, bias_grad


def _penalize_rank(sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    x, dy = (torch.split(part, list(sizes))[dist.get_rank()].clone() for part in _values(2, sum(sizes), 4, 3, 2))
    return _penalized(SyncBatchNorm(4, dtype=torch.float64), x, dy)


@pytest.mark.parametrize("sizes", [(5,), (3, 2), (3, 0, 2), (1, 2, 0, 4)], ids=["1", "2", "3", "4"])
def test_a_gradient_penalty_on_unequal_and_empty_ranks_is_that_of_one_process(sizes: tuple[int, ...]) -> None:
    ranks = run_ranks(len(sizes), _penalize_rank, sizes)
    x, dy = _values(2, sum(sizes), 4, 3, 2)
    expected = _penalized(nn.BatchNorm2d(4, dtype=torch.float64), x.clone(), dy)
    torch.testing.assert_close(torch.cat([rank[0] for rank in ranks]), expected[0], rtol=1e-9, atol=1e-9)
    for place in (1, 2):
        total = torch.stack([rank[place] for rank in ranks]).sum(0)
        torch.testing.assert_close(total, expected[place], rtol=1e-9, atol=1e-9)


def _collectives_of_two_orders() -> list[int]:
    layer = SyncBatchNorm(4)
    x = torch.randn(3 * dist.get_rank(), 4, 2).requires_grad_()
    logs = [CollectiveLog() for _ in range(4)]
    with logs[0]:
        y = layer(x)
    with logs[1]:
        torch.autograd.grad(y.sum(), x, retain_graph=True)
    grad_output = torch.ones_like(y).requires_grad_()
    with logs[2]:
        (grad,) = torch.autograd.grad(y, x, grad_output, create_graph=True)
    with logs[3]:
        torch.autograd.grad(grad.square().sum(), [x, grad_output])
    return [len(log.collectives) for log in logs]


def test_a_second_order_costs_two_exchanges_and_the_first_still_one() -> None:
    assert run_ranks(2, _collectives_of_two_orders) == [[1, 1, 1, 2]] * 2


def _loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    layer = SyncBatchNorm(4, dtype=torch.float64)
    return torch.func.functional_call(layer, (parameters, buffers), (x,)).pow(3).sum(), buffers


def _functional_gradients(sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    layer = SyncBatchNorm(4, dtype=torch.float64)
    x = torch.split(_values(5, 4, 2), list(sizes))[dist.get_rank()]
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    gradient = torch.func.grad(_loss, argnums=(0, 2), has_aux=True)
    (of_parameters, of_x), tracked = gradient(parameters, buffers, x)
    return of_x, of_parameters["weight"], of_parameters["bias"], tracked["running_mean"], tracked["running_var"]


@pytest.mark.parametrize("sizes", [(5,), (3, 2), (2, 0, 3)], ids=["1", "2", "3"])
def test_torch_func_differentiates_the_layer_and_hands_back_its_buffers(sizes: tuple[int, ...]) -> None:
    ranks = run_ranks(len(sizes), _functional_gradients, sizes)
    layer = nn.BatchNorm1d(4, dtype=torch.float64)
    x = _values(5, 4, 2).requires_grad_()
    layer(x).pow(3).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(torch.cat([rank[0] for rank in ranks]), x.grad, rtol=1e-10, atol=1e-10)
    for place, parameter in ((1, layer.weight), (2, layer.bias)):
        total = torch.stack([rank[place] for rank in ranks]).sum(0)
        torch.testing.assert_close(total, parameter.grad, rtol=1e-10, atol=1e-10)
    for rank in ranks:
        torch.testing.assert_close(rank[3], layer.running_mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(rank[4], layer.running_var, rtol=1e-10, atol=1e-10)


def test_vmap_maps_evaluation_over_batches() -> None:
    layer = SyncBatchNorm(4).double()
    layer(_values(5, 4, 2))
    layer.eval()
    batches = _values(3, 5, 4, 2)
    mapped = torch.func.vmap(layer)(batches)
    torch.testing.assert_close(mapped, torch.stack([layer(batch) for batch in batches]), rtol=1e-12, atol=1e-12)


def test_vmap_over_batches_that_ranks_share_is_refused_with_the_remedy() -> None:
    assert all("map it in evaluation mode, or loop" in message for message in run_ranks(2, _map_training))


def _map_training() -> str:
    with pytest.raises(TypeError, match="vmap") as error:
        torch.func.vmap(SyncBatchNorm(4))(torch.randn(3, 5, 4))
    return str(error.value)


def _call_twice() -> tuple[Tensor, Tensor]:
    layer = SyncBatchNorm(4, dtype=torch.float64)
    x = torch.split(_values(5, 4, 2), [3, 2])[dist.get_rank()].clone().requires_grad_()
    layer(layer(x).sin() * 3).pow(3).sum().backward()
    assert x.grad is not None
    assert layer.running_var is not None
    return x.grad, layer.running_var


def test_a_layer_used_twice_in_one_forward_is_tracked_and_differentiated_twice() -> None:
    ranks = run_ranks(2, _call_twice)
    layer = nn.BatchNorm1d(4, dtype=torch.float64)
    x = _values(5, 4, 2).requires_grad_()
    layer(layer(x).sin() * 3).pow(3).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(torch.cat([rank[0] for rank in ranks]), x.grad, rtol=1e-9, atol=1e-9)
    for rank in ranks:
        torch.testing.assert_close(rank[1], layer.running_var, rtol=1e-10, atol=1e-10)
