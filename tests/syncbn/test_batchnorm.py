"""The layer on real ranks: the same as one process with the joined batch, and never more talk than promised."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn import SyncBatchNorm
from tests.ranks import run_ranks
from tests.syncbn.collectives import Collective, CollectiveLog
from tests.syncbn.joined import Case, check_equals_joined

F32, F64 = torch.float32, torch.float64


@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("sizes", [(5, 3), (3, 0, 5), (4, 1, 0, 7)], ids=["2", "3", "4"])
def test_unequal_and_empty_ranks_equal_one_process(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    check_equals_joined(Case(sizes, dtype=dtype))


@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    "case",
    [
        Case((1, 1), shape=(4,)),
        Case((40, 30), shape=(7,)),
        Case((3, 2), shape=(5, 9)),
        Case((2, 1), shape=(3, 2, 3, 4)),
        Case((3, 2), shape=(16, 56, 60)),
        Case((3, 2), channels_last=True),
        Case((3, 2), shape=(16, 56, 60), channels_last=True),
        Case((3, 2), momentum=None, num_steps=4),
        Case((3, 2), affine=False),
    ],
    ids=["one-row", "2d", "3d", "5d", "large", "channels-last", "large-channels-last", "cumulative", "not-affine"],
)
def test_every_kind_of_input_equals_one_process(case: Case, dtype: torch.dtype) -> None:
    check_equals_joined(Case(**{**vars(case), "dtype": dtype}))


def test_a_mean_of_ten_thousand_deviations_keeps_its_variance() -> None:
    # In float64 the packed sum of squares loses eight digits of sixteen: the tolerance of float32 is left.
    results = run_ranks(2, _far_from_zero)
    x = torch.cat([_far_values(0), _far_values(1)]).double()
    for mean, var in results:
        torch.testing.assert_close(mean, x.mean((0, 2, 3)), rtol=1e-7, atol=0, check_dtype=False)
        torch.testing.assert_close(var, x.var((0, 2, 3)), rtol=2e-5, atol=0, check_dtype=False)


def _far_values(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(8, 3, 64, 64, generator=generator) + 1e4


def _far_from_zero() -> tuple[Tensor, Tensor]:
    layer = SyncBatchNorm(3, momentum=1.0)
    y = layer(_far_values(dist.get_rank()))
    assert y.isfinite().all()
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


@pytest.mark.parametrize("world_size", [2, 3])
def test_one_collective_forward_and_one_backward(world_size: int) -> None:
    for forward, backward in run_ranks(world_size, _collectives_of_a_step):
        assert forward == [Collective("alltoall_base_", 2 * 6 + 1, "float64")]
        assert backward == [Collective("alltoall_base_", 2 * 6, "float64")]


def _collectives_of_a_step() -> tuple[list[Collective], list[Collective]]:
    layer = SyncBatchNorm(6)
    x = torch.randn(2 * dist.get_rank(), 6, 3, 3, requires_grad=True)
    with CollectiveLog() as forward:
        y = layer(x)
    with CollectiveLog() as backward:
        y.sum().backward()
    return forward.collectives, backward.collectives


def test_an_input_without_gradient_costs_no_backward_collective() -> None:
    for collectives, grad in run_ranks(2, _backward_to_parameters_alone):
        assert collectives == []
        torch.testing.assert_close(grad, torch.full((6,), 18.0))


def _backward_to_parameters_alone() -> tuple[list[Collective], Tensor | None]:
    layer = SyncBatchNorm(6)
    y = layer(torch.randn(2, 6, 3, 3))
    with CollectiveLog() as log:
        y.sum().backward()
    return log.collectives, layer.bias.grad


def test_any_choice_of_what_needs_a_gradient_gets_that_of_one_process() -> None:
    ranks = run_ranks(2, _train_every_choice)
    x = torch.cat([_choice_input(rank) for rank in range(2)]).double().requires_grad_()
    layer = nn.BatchNorm1d(4, dtype=F64)
    layer(x).pow(3).sum().backward()
    for choice in ranks[0]:
        for place, leaf in enumerate((x, layer.weight, layer.bias)):
            grads = [grad for rank in ranks if (grad := rank[choice][place]) is not None]
            assert len(grads) == (2 if choice[place] else 0)
            if grads:
                joined = torch.cat(grads) if place == 0 else torch.stack(grads).sum(0)
                torch.testing.assert_close(joined.double(), leaf.grad, rtol=1e-4, atol=1e-4)


def _choice_input(rank: int) -> Tensor:
    return torch.randn(3 - rank, 4, generator=torch.Generator().manual_seed(rank))


def _train_every_choice() -> dict[tuple[bool, ...], list[Tensor | None]]:
    grads: dict[tuple[bool, ...], list[Tensor | None]] = {}
    for choice in itertools.product([False, True], repeat=3):
        layer, x = SyncBatchNorm(4), _choice_input(dist.get_rank())
        leaves = (x, layer.weight, layer.bias)
        for leaf, needed in zip(leaves, choice, strict=True):
            leaf.requires_grad_(needed)
        y = layer(x).pow(3).sum()
        if any(choice):
            y.backward()
        assert y.requires_grad is any(choice)
        grads[choice] = [leaf.grad for leaf in leaves]
    return grads


@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
def test_evaluation_never_communicates(tracked: bool) -> None:
    assert run_ranks(2, _evaluate_on_one_rank, tracked) == [[], []]


def _evaluate_on_one_rank(tracked: bool) -> list[Collective]:
    layer = SyncBatchNorm(4, track_running_stats=tracked).eval()
    x = torch.randn(3, 4, 5)
    with CollectiveLog() as log:
        if dist.get_rank() == 1:
            expected = nn.BatchNorm1d(4, track_running_stats=tracked).eval()(x)
            assert torch.equal(layer(x), expected)
    collectives: list[Collective] = log.collectives
    return collectives


def test_too_few_values_raise_on_every_rank_and_leave_the_statistics() -> None:
    for message, buffers, next_mean in run_ranks(3, _train_on_one_value):
        assert "more than one value per channel over all ranks" in message
        assert buffers == [[0.0] * 4, [1.0] * 4, 0]
        assert next_mean == [pytest.approx(0.1)] * 4  # of 0, 1 and 2, by a tenth: the ranks are still in step


def _train_on_one_value() -> tuple[str, list[object], list[float]]:
    layer = SyncBatchNorm(4)
    with pytest.raises(ValueError, match="more than one value") as error:
        layer(torch.randn(1 if dist.get_rank() == 2 else 0, 4))
    buffers: list[object] = [buffer.tolist() for buffer in layer.buffers()]
    layer(torch.full((1, 4), float(dist.get_rank())))
    return str(error.value), buffers, layer.get_buffer("running_mean").tolist()


NOTHING = [
    torch.empty(0, 4),
    torch.empty(2, 4, 0, dtype=torch.float16),
    torch.empty(0, 4, 3, 2, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last),
    torch.empty(2, 4, 3, 0, 2).contiguous(memory_format=torch.channels_last_3d),
]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("world_size", [1, 3])
def test_nothing_on_any_rank_changes_nothing(world_size: int, momentum: float | None) -> None:
    for before, after, grads in run_ranks(world_size, _train_on_nothing, momentum):
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert all(grad is not None and torch.equal(grad, torch.zeros(4)) for grad in grads)


def _train_on_nothing(momentum: float | None) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor | None]]:
    layer = SyncBatchNorm(4, momentum=momentum)
    layer(torch.randn(3, 4))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    for nothing in NOTHING:
        x = nothing.clone().requires_grad_()
        y = layer(x)
        y.sum().backward()
        assert x.grad is not None
        assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, x.stride())
        assert (x.grad.shape, x.grad.dtype, x.grad.stride()) == (x.shape, x.dtype, x.stride())
    return before, dict(layer.named_buffers()), [parameter.grad for parameter in layer.parameters()]


def test_the_running_variance_is_unbiased_over_the_global_count() -> None:
    values = [torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])]
    for running_var in run_ranks(2, _running_variance, values):
        # Mean 3, squares 4 + 1 + 9 = 14, divided by 3 - 1.
        torch.testing.assert_close(running_var, torch.tensor([7.0]))


def _running_variance(values: list[Tensor]) -> Tensor | None:
    layer = SyncBatchNorm(1, momentum=1.0)
    layer(values[dist.get_rank()])
    return layer.running_var


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (8, 16, 56, 60)], ids=["small", "large"])
def test_half_precision_keeps_its_statistics_in_float32(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(5)
    joined = torch.randn(2, 2, *shape, generator=generator).to(dtype)
    layer = nn.BatchNorm2d(shape[1], dtype=F64)
    x = joined[0].double().flatten(0, 1).requires_grad_()
    y = layer(x)
    y.backward(joined[1].double().flatten(0, 1))
    assert x.grad is not None
    results = run_ranks(2, _train_half, joined)
    tolerance = 8 * torch.finfo(dtype).eps  # a rounding or two of outputs up to 4
    for actual, expected in ((0, y.detach()), (1, x.grad)):
        torch.testing.assert_close(
            torch.cat([rank[actual] for rank in results]).double(), expected, rtol=tolerance, atol=tolerance
        )
    for rank in results:
        assert rank[0].dtype == rank[1].dtype == dtype
        torch.testing.assert_close(rank[2], layer.running_mean, check_dtype=False, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rank[3], layer.running_var, check_dtype=False, rtol=1e-5, atol=1e-6)


def _train_half(joined: Tensor) -> tuple[Tensor, ...]:
    x, dy = joined[:, dist.get_rank()]
    layer = SyncBatchNorm(x.size(1))
    y = layer(x.requires_grad_())
    y.backward(dy)
    assert x.grad is not None
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return y.detach(), x.grad, layer.running_mean, layer.running_var


@pytest.mark.parametrize("world_size", [1, 4])
def test_autocast_does_not_reach_the_statistics(world_size: int) -> None:
    for inside, outside in run_ranks(world_size, _moments_with_and_without_autocast):
        assert torch.equal(inside, outside)


def _moments_with_and_without_autocast() -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 4, 7)
    inside, outside = SyncBatchNorm(4), SyncBatchNorm(4)
    with torch.autocast("cpu", torch.bfloat16):
        inside(x)
    outside(x)
    return torch.cat(list(inside.buffers())[:2]), torch.cat(list(outside.buffers())[:2])


def test_a_subgroup_is_joined_by_itself() -> None:
    for rank, means in enumerate(run_ranks(4, _means_by_subgroup)):
        torch.testing.assert_close(means, torch.tensor([0.5 if rank < 2 else 2.5]))


def _means_by_subgroup() -> Tensor | None:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    layer = SyncBatchNorm(1, momentum=1.0, process_group=groups[dist.get_rank() // 2])
    layer(torch.full((3, 1), float(dist.get_rank())))
    return layer.running_mean


def test_a_group_without_this_rank_is_refused() -> None:
    assert run_ranks(2, _train_in_a_foreign_group) == [None, "this rank is not a member of the process group"]


def _train_in_a_foreign_group() -> str | None:
    group = dist.new_group([0])
    layer = SyncBatchNorm(1, process_group=group)
    if dist.get_rank() == 0:
        layer(torch.randn(3, 1))
        return None
    with pytest.raises(ValueError, match="not a member") as error:
        layer(torch.randn(3, 1))
    return str(error.value).partition(";")[0]


def test_without_peers_it_is_torchs_layer_bit_for_bit() -> None:
    x = torch.randn(5, 4, 3, 3)
    ours, theirs = SyncBatchNorm(4), nn.BatchNorm2d(4)
    assert torch.equal(ours(x), theirs(x))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))


def test_the_state_dict_is_torchs() -> None:
    ours, theirs = SyncBatchNorm(4), nn.BatchNorm2d(4)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.load_state_dict(theirs.state_dict()).missing_keys == []


@pytest.mark.parametrize("shape", [(3,), (2, 5, 3), (1, 4, 1, 1, 1, 1)], ids=["1d", "channels", "6d"])
def test_a_wrong_input_is_refused_with_its_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        SyncBatchNorm(4)(torch.randn(shape))


def test_a_deep_copy_keeps_the_group_and_copies_the_rest() -> None:
    assert run_ranks(2, _copy_with_group) == [True, True]


def _copy_with_group() -> bool:
    layer = SyncBatchNorm(2, process_group=dist.new_group([0, 1]))
    copied = copy.deepcopy(nn.Sequential(layer))[0]
    assert isinstance(copied, SyncBatchNorm)
    assert copied.weight is not layer.weight
    copied(torch.randn(2, 2))
    return copied.process_group is layer.process_group
