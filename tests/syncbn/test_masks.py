"""Masks: a padded batch is the batch without its padding, whatever the padding holds."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn import SyncBatchNorm, sync_batch_norm
from syncbn.kernels.aten import local_moments
from tests.ranks import run_ranks
from tests.syncbn.collectives import Collective, CollectiveLog

F64 = torch.float64


def _batch(sizes: tuple[int, ...], length: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Joined inputs ``(N, 4, length)``, gradients of outputs, and a mask by lengths, of which some are 0."""
    generator = torch.Generator().manual_seed(6)
    shape = (sum(sizes), 4, length)
    x, dy = (torch.randn(shape, generator=generator, dtype=F64) * 2 + 1 for _ in range(2))
    lengths = torch.randint(0, length + 1, (shape[0],), generator=generator)
    return x, dy, torch.arange(length) < lengths.unsqueeze(1)


def _rows(values: Tensor, mask: Tensor) -> Tensor:
    """What counts, as ``(M, C)``."""
    return values.movedim(1, -1)[mask]


def _train_masked(sizes: tuple[int, ...], padding: float) -> tuple[Tensor, Tensor, list[Tensor], list[Collective]]:
    x, dy, mask = (torch.split(part, list(sizes))[dist.get_rank()] for part in _batch(sizes))
    positions = mask.unsqueeze(1)
    x = torch.where(positions, x, padding).requires_grad_()
    layer = SyncBatchNorm(4, dtype=F64)
    with CollectiveLog() as log:
        y = layer(x, mask)
        y.backward(torch.where(positions, dy, padding))
    assert x.grad is not None
    grads = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
    return y.detach(), x.grad, grads + list(layer.buffers()), log.collectives


@pytest.mark.parametrize("padding", [0.0, 1e30, math.nan, math.inf], ids=str)
@pytest.mark.parametrize("sizes", [(4,), (5, 2), (3, 0, 6), (1, 4, 0, 2)], ids=["1", "2", "3", "4"])
def test_padding_on_ranks_is_as_if_it_were_not_there(sizes: tuple[int, ...], padding: float) -> None:
    x, dy, mask = _batch(sizes)
    layer = nn.BatchNorm1d(4, dtype=F64)
    rows = _rows(x, mask).requires_grad_()
    y = layer(rows)
    y.backward(_rows(dy, mask))
    ranks = run_ranks(len(sizes), _train_masked, sizes, padding)
    assert rows.grad is not None
    for place, expected in ((0, y.detach()), (1, rows.grad)):
        values = torch.cat([rank[place] for rank in ranks])  # type: ignore[misc]
        torch.testing.assert_close(_rows(values, mask), expected, rtol=1e-10, atol=1e-10)
        assert (_rows(values, ~mask) == 0).all()
    for place, parameter in enumerate(layer.parameters()):
        total = torch.stack([rank[2][place] for rank in ranks]).sum(0)
        torch.testing.assert_close(total, parameter.grad, rtol=1e-10, atol=1e-9)
    for rank in ranks:
        for actual, wanted in zip(rank[2][2:], layer.buffers(), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)
        assert [collective.num_values for collective in rank[3]] == ([9, 8] if len(sizes) > 1 else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, F64], ids=str)
@pytest.mark.parametrize("shape", [(400, 8), (30, 8, 40, 50), (6, 3, 5)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
def test_masked_moments_are_those_of_what_counts(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(shape, generator=generator) + 30).to(dtype)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    mask = torch.rand(shape[:1] + shape[2:], generator=generator) < 0.3
    for part in (mask, mask.flatten(1)[:, 0] if len(shape) > 2 else mask):  # by position, and by sample
        moments = local_moments(x, part)
        values = x.double().movedim(1, -1)[part].reshape(-1, shape[1])
        var, mean = torch.var_mean(values, 0, correction=0)
        assert moments.count == len(values)
        torch.testing.assert_close(moments.mean, mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(moments.var, var, rtol=1e-5, atol=0)


def test_a_mask_without_any_true_is_an_empty_batch() -> None:
    layer = SyncBatchNorm(3)
    before = [buffer.clone() for buffer in layer.buffers()]
    x = torch.full((4, 3), math.nan, requires_grad=True)
    y = layer(x, torch.zeros(4, dtype=torch.bool))
    y.sum().backward()
    assert x.grad is not None
    assert (y == 0).all()
    assert (x.grad == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))


@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
def test_evaluation_masks_too_and_never_communicates(tracked: bool) -> None:
    assert run_ranks(2, _evaluate_masked, tracked) == [0, 0]


def _evaluate_masked(tracked: bool) -> int:
    x, _, mask = _batch((5,))
    layer = SyncBatchNorm(4, track_running_stats=tracked, dtype=F64).eval()
    plain = nn.BatchNorm1d(4, track_running_stats=tracked, dtype=F64).eval()
    with CollectiveLog() as log:
        y = layer(torch.where(mask.unsqueeze(1), x, math.nan), mask)
    torch.testing.assert_close(_rows(y, mask), plain(_rows(x, mask)), rtol=1e-10, atol=1e-10)
    assert (_rows(y, ~mask) == 0).all()
    return len(log.collectives)


def test_a_mask_of_one_value_on_all_ranks_raises_on_every_rank() -> None:
    assert all("got one" in message for message in run_ranks(2, _train_on_one_position))


def _train_on_one_position() -> str:
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 3] = dist.get_rank() == 1
    with pytest.raises(ValueError, match="more than one value") as error:
        SyncBatchNorm(4)(torch.randn(2, 4, 5), mask)
    return str(error.value)


def test_one_rank_may_mask_and_another_not() -> None:
    means = run_ranks(2, _mask_on_one_rank)
    torch.testing.assert_close(means[0], torch.tensor([(2 * 1.0 + 3 * 5.0) / 5]))
    assert torch.equal(means[0], means[1])


def _mask_on_one_rank() -> Tensor:
    layer = SyncBatchNorm(1, momentum=1.0)
    if dist.get_rank() == 0:
        layer(torch.tensor([[1.0], [1.0], [9.0]]), torch.tensor([True, True, False]))
    else:
        layer(torch.full((3, 1), 5.0))
    assert layer.running_mean is not None
    return layer.running_mean


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 5), torch.ones(2, 4, 5, dtype=torch.bool), torch.ones(5, dtype=torch.bool), torch.tensor(True)],
    ids=["float", "with-channels", "not-by-sample", "scalar"],
)
def test_a_mask_that_fits_no_position_is_refused_with_both_shapes(mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"boolean mask.*\(2, 5\)"):
        sync_batch_norm(torch.randn(2, 4, 5), mask=mask)


def test_a_masked_gradient_can_be_differentiated_again() -> None:
    x, dy, mask = _batch((5,))
    rows, padded = _rows(x, mask).requires_grad_(), torch.where(mask.unsqueeze(1), x, math.nan).requires_grad_()
    y, expected = sync_batch_norm(padded, mask=mask), nn.functional.batch_norm(rows, None, None, training=True)
    second = []
    for output, leaf, gradient in ((y, padded, dy), (expected, rows, _rows(dy, mask))):
        (grad,) = torch.autograd.grad(output.sin(), leaf, gradient, create_graph=True)
        second.append(torch.autograd.grad(grad.square().sum(), leaf)[0])
    torch.testing.assert_close(_rows(second[0], mask), second[1], rtol=1e-9, atol=1e-9)
    assert (_rows(second[0], ~mask) == 0).all()
