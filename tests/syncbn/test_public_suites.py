"""What public test suites of synchronized BatchNorm check, checked here; each test names the file that checks it.

The checks are the suites', with their tolerances where they state any; values come from `tests.syncbn.reckoning`, and
ranks are gloo processes where the suites want GPUs. ``docs/layer.md`` lists every test of these suites: which is run as
it is, in `test_torch_suite`, which is here, and why the others cannot be.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from syncbn import (
    Estimator,
    SyncBatchNorm,
    apply_statistics,
    convert_sync_batchnorm,
    freeze,
    population_statistics,
    unfreeze,
)
from syncbn.normalizers import FrozenBatchNorm
from tests.ranks import run_ranks
from tests.syncbn.collectives import CollectiveLog
from tests.syncbn.reckoning import Reckoned, reckon

Results = dict[str, Tensor]


def _random(*shape: int, seed: int = 18, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> Results:
    """Forward and backward; ``layer`` may be wrapped. Everything that a suite may ask for."""
    x = x.clone().requires_grad_()
    output = layer(x)
    output.backward(dy)
    assert x.grad is not None
    inner = layer.module if isinstance(layer, DistributedDataParallel) else layer
    grads = {f"{name}_grad": p.grad for name, p in inner.named_parameters() if p.grad is not None}
    buffers = {name: buffer.clone() for name, buffer in inner.named_buffers()}
    return {"output": output.detach(), "input_grad": x.grad, **grads, **buffers}


def _layer(weight: Tensor, bias: Tensor, group: dist.ProcessGroup | None = None) -> SyncBatchNorm:
    layer = SyncBatchNorm(len(weight), momentum=1.0, process_group=group, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def _close(actual: Tensor, expected: Any, tolerance: float) -> None:
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=tolerance, atol=tolerance)


APEX_TYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.float32, 1e-5), (torch.float64, 1e-8)], ids=str
)


def _apex_case(dtype: torch.dtype, seed: int = 18) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, dy = _random(32, 10, 12, 12, seed=seed, dtype=dtype), _random(32, 10, 12, 12, seed=seed + 100, dtype=dtype)
    return x, dy, _random(10, seed=1, dtype=dtype), _random(10, seed=2, dtype=dtype)


def _assert_step(results: Results, expected: Reckoned, tolerance: float, rows: slice, share: float) -> None:
    _close(results["output"], expected.output[rows], tolerance)
    _close(results["input_grad"], expected.input_grad[rows], tolerance)
    _close(results["running_mean"], expected.mean, tolerance)
    _close(results["running_var"], expected.unbiased_var, tolerance)
    for name, grad in (("weight_grad", expected.weight_grad), ("bias_grad", expected.bias_grad)):
        # Each rank rounds its own sum to the type of its parameters, however small the sum of both is.
        rounding = torch.finfo(results["output"].dtype).eps * np.abs(grad).max()
        _close(results[name], grad * share, tolerance + rounding)


@APEX_TYPES
def test_apex_two_ranks_equal_a_float64_reference_in_every_type(dtype: torch.dtype, tolerance: float) -> None:
    """As apex, tests/distributed/synced_batchnorm/two_gpu_unit_test.py, with --fp16 and --fp64."""
    x, dy, weight, bias = _apex_case(dtype)
    expected = reckon(x, dy, weight, bias)
    for rank, results in enumerate(run_ranks(2, _apex_step, dtype)):
        _assert_step(results, expected, tolerance, slice(16 * rank, 16 * rank + 16), share=1 / 2)
        stepped = {"weight": weight.double() - results["weight_grad"], "bias": bias.double() - results["bias_grad"]}
        assert all(torch.equal(results[name], value.to(dtype)) for name, value in stepped.items())


def _apex_step(dtype: torch.dtype) -> Results:
    rows = slice(16 * dist.get_rank(), 16 * dist.get_rank() + 16)
    x, dy, weight, bias = _apex_case(dtype)
    layer = _layer(weight, bias)
    results = _step(DistributedDataParallel(layer), x[rows], dy[rows])
    torch.optim.SGD(layer.parameters(), lr=1.0).step()
    return results | {name: parameter.detach() for name, parameter in layer.named_parameters()}


@APEX_TYPES
def test_apex_one_process_equals_a_float64_reference_in_every_type(dtype: torch.dtype, tolerance: float) -> None:
    """As apex, tests/distributed/synced_batchnorm/single_gpu_unit_test.py and python_single_gpu_unit_test.py."""
    x, dy, weight, bias = _apex_case(dtype)
    results = _step(_layer(weight, bias), x, dy)
    _assert_step(results, reckon(x, dy, weight, bias), tolerance, slice(None), share=1)


@APEX_TYPES
def test_apex_groups_of_two_among_four_ranks_see_their_own_batch(dtype: torch.dtype, tolerance: float) -> None:
    """As apex, tests/distributed/synced_batchnorm/test_groups.py --group_size=2."""
    expected = [reckon(*_apex_case(dtype, seed=18 + group)) for group in range(2)]
    for rank, results in enumerate(run_ranks(4, _group_step, dtype)):
        rows = slice(16 * (rank % 2), 16 * (rank % 2) + 16)
        _assert_step(results, expected[rank // 2], tolerance, rows, share=1)


def _group_step(dtype: torch.dtype) -> Results:
    """Gradients of parameters are summed within the group, which the layer leaves to others."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    rows = slice(16 * (rank % 2), 16 * (rank % 2) + 16)
    x, dy, weight, bias = _apex_case(dtype, seed=18 + rank // 2)
    results = _step(_layer(weight, bias, groups[rank // 2]), x[rows], dy[rows])
    for name in ("weight_grad", "bias_grad"):
        results[name] = results[name].double()
        dist.all_reduce(results[name], group=groups[rank // 2])
    return results


def test_apex_different_batch_sizes_weigh_by_their_samples() -> None:
    """As apex, tests/distributed/synced_batchnorm/two_gpu_test_different_batch_size.py: 16 samples and 8."""
    model = _conv_and_norm(nn.BatchNorm2d(6))
    x, dy = (torch.cat(parts) for parts in zip(_uneven_batch(0), _uneven_batch(1), strict=True))
    output = model(x)
    output.backward(dy / 24)
    results = run_ranks(2, _uneven_step)
    tolerance = 1e-5
    _close(torch.cat([result["output"] for result in results]), output.detach(), tolerance)
    for result in results:
        _close(result["1.running_mean"], model.get_buffer("1.running_mean"), tolerance)
        _close(result["1.running_var"], model.get_buffer("1.running_var"), tolerance)
        _close(result["1.weight_grad"], model.get_parameter("1.weight").grad, 1e-6)
        _close(result["0.weight_grad"], model.get_parameter("0.weight").grad, tolerance)


def _conv_and_norm(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(2809)
    return nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1), norm)


def _uneven_batch(rank: int) -> tuple[Tensor, Tensor]:
    size, spread = ((16, 50.0), (8, 1.0))[rank]
    generator = torch.Generator().manual_seed(rank)
    return (
        torch.randn(size, 3, 8, 8, generator=generator) * spread,
        torch.randint(0, 10, (size, 6, 8, 8), generator=generator) / 10,
    )


def _uneven_step() -> Results:
    x, dy = _uneven_batch(dist.get_rank())
    return _step(DistributedDataParallel(_conv_and_norm(SyncBatchNorm(6))), x, dy * 2 / 24)


@pytest.mark.parametrize("shape", [(32, 1000), (6, 10, 25)], ids=["2d", "3d"])
def test_apex_inputs_without_an_image_pass_through(shape: tuple[int, ...]) -> None:
    """As apex, tests/distributed/synced_batchnorm/test_batchnorm1d.py."""
    x, dy = _random(*shape), _random(*shape, seed=19)
    weight, bias = torch.ones(shape[1]), torch.zeros(shape[1])
    _assert_step(_step(_layer(weight, bias), x, dy), reckon(x, dy, weight, bias), 1e-4, slice(None), share=1)


MMCV_WEIGHT, MMCV_BIAS = torch.tensor([0.2, 0.5, 0.7]), torch.zeros(3)
MMCV_CASES = pytest.mark.parametrize(
    ("size", "dtype"), list(itertools.product([1, 2, 4], [torch.float32, torch.float16])), ids=str
)


@MMCV_CASES
def test_mmcv_groups_of_one_two_and_four_equal_the_groups_batch(size: int, dtype: torch.dtype) -> None:
    """As mmcv, tests/test_ops/test_syncbn.py, test_syncbn_{1,2,4}{,_half}; gradients here are sums, not means."""
    x, dy = _mmcv_batch(16, dtype)
    results = run_ranks(4, _mmcv_step, 16, size, dtype)
    for group in range(4 // size):
        rows = slice(4 * size * group, 4 * size * (group + 1))
        expected = reckon(x[rows], dy[rows], MMCV_WEIGHT, MMCV_BIAS)
        members = results[size * group : size * (group + 1)]
        for result in members:
            _close(result["running_mean"], expected.mean, 1e-3)
            _close(result["running_var"], expected.unbiased_var, 1e-3)
        _close(torch.cat([result["output"] for result in members]), expected.output, 2e-3)
        _close(torch.cat([result["input_grad"] for result in members]), expected.input_grad, 1e-2)
        _close(sum((result["weight_grad"] for result in members), torch.zeros(3)), expected.weight_grad, 1e-3)
        _close(sum((result["bias_grad"] for result in members), torch.zeros(3)), expected.bias_grad, 1e-3)


@MMCV_CASES
def test_mmcv_groups_without_any_sample_are_left_as_they_were(size: int, dtype: torch.dtype) -> None:
    """As mmcv, tests/test_ops/test_syncbn.py, test_syncbn_empty_{1,2,4}{,_half}."""
    for result in run_ranks(4, _mmcv_step, 0, size, dtype):
        assert result["output"].shape == result["input_grad"].shape == (0, 3, 2, 3)
        assert torch.equal(result["running_mean"], torch.zeros(3))
        assert torch.equal(result["running_var"], torch.ones(3))
        assert torch.equal(result["weight_grad"], torch.zeros(3))
        assert torch.equal(result["bias_grad"], torch.zeros(3))


def _mmcv_batch(num_samples: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    x, dy = torch.rand(2, num_samples, 3, 2, 3, generator=generator).to(dtype)
    return x, dy


def _mmcv_step(num_samples: int, size: int, dtype: torch.dtype) -> Results:
    rank = dist.get_rank()
    groups = [dist.new_group(list(range(start, start + size))) for start in range(0, 4, size)]
    x, dy = _mmcv_batch(num_samples, dtype)
    rows = slice(4 * rank, 4 * rank + 4)
    return _step(_layer(MMCV_WEIGHT, MMCV_BIAS, groups[rank // size]), x[rows], dy[rows])


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(nn.BatchNorm1d, (4, 3, 4)), (nn.BatchNorm2d, (4, 3, 4, 4)), (nn.BatchNorm3d, (4, 3, 4, 4, 4))],
    ids=["1d", "2d", "3d"],
)
class TestFairscale:
    """fairscale tests/experimental/nn/test_sync_batchnorm.py, with allclose's tolerances."""

    def test_parity_with_batchnorm_in_one_process(self, kind: type[nn.Module], shape: tuple[int, ...]) -> None:
        """parity{1,2,3}d_bn."""
        x, dy = _random(*shape), _random(*shape, seed=1)
        theirs = _step(kind(3), x, dy)
        for name, value in _step(SyncBatchNorm(3), x, dy).items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-7)

    def test_parity_on_ranks_of_which_one_sees_zeros_only(self, kind: type[nn.Module], shape: tuple[int, ...]) -> None:
        """parity{1,2,3}d_syncbn: rank r's input is r times noise."""
        self._check_parity(kind, shape, _fairscale_step)

    def test_parity_of_a_recomputed_layer(self, kind: type[nn.Module], shape: tuple[int, ...]) -> None:
        """parity3d_checkpoint_syncbn."""
        self._check_parity(kind, shape, _fairscale_recomputed_step)

    def test_parity_of_a_layer_recomputed_twice(self, kind: type[nn.Module], shape: tuple[int, ...]) -> None:
        """parity3d_checkpoint_syncbn_twice."""
        results = run_ranks(2, _fairscale_recomputed_twice, shape)
        plain = run_ranks(2, _fairscale_twice, shape)
        for result, expected in zip(results, plain, strict=True):
            for name, value in expected.items():
                torch.testing.assert_close(result[name], value, rtol=1e-5, atol=1e-6)

    def _check_parity(self, kind: type[nn.Module], shape: tuple[int, ...], step: Callable[..., Results]) -> None:
        shares = [_fairscale_batch(rank, shape) for rank in range(2)]
        x, dy = (torch.cat(parts) for parts in zip(*shares, strict=True))
        joined = _step(kind(3), x, dy)
        results = run_ranks(2, step, shape)
        for name in ("output", "input_grad"):
            torch.testing.assert_close(torch.cat([r[name] for r in results]), joined[name], rtol=1e-5, atol=1e-6)
        for result in results:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                torch.testing.assert_close(result[name], joined[name], rtol=1e-5, atol=1e-7)
            for name in ("weight_grad", "bias_grad"):
                torch.testing.assert_close(result[name] * 2, joined[name], rtol=1e-5, atol=1e-5)


def _fairscale_batch(rank: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return _random(*shape, seed=rank) * rank, _random(*shape, seed=10 + rank)


def _fairscale_step(shape: tuple[int, ...]) -> Results:
    return _step(DistributedDataParallel(SyncBatchNorm(3)), *_fairscale_batch(dist.get_rank(), shape))


class Recomputed(nn.Module):
    """Forgets what its layer computed, and computes it again in the backward."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = checkpoint(self.layer, x, use_reentrant=False)
        return output


def _fairscale_recomputed_step(shape: tuple[int, ...]) -> Results:
    results = _step(DistributedDataParallel(Recomputed(SyncBatchNorm(3))), *_fairscale_batch(dist.get_rank(), shape))
    return {name.removeprefix("layer."): value for name, value in results.items()}


def _fairscale_recomputed_twice(shape: tuple[int, ...]) -> Results:
    layer = SyncBatchNorm(3)
    twice = nn.Sequential(Recomputed(layer), nn.ReLU(), Recomputed(layer))
    results = _step(twice, *_fairscale_batch(dist.get_rank(), shape))
    return {name.replace("layer.", ""): value for name, value in results.items()}


def _fairscale_twice(shape: tuple[int, ...]) -> Results:
    layer = SyncBatchNorm(3)
    return _step(nn.Sequential(layer, nn.ReLU(), layer), *_fairscale_batch(dist.get_rank(), shape))


@pytest.mark.parametrize("width", [1, 2])
def test_horovod_ranks_equal_batchnorm_over_the_stack(width: int) -> None:
    """As horovod, test/parallel/test_torch.py, test_horovod_sync_batch_norm."""
    stack = _horovod_stack(width)
    joined = _step(nn.BatchNorm1d(4), stack, torch.ones_like(stack))
    results = run_ranks(4, _horovod_step, width)
    torch.testing.assert_close(torch.cat([result["output"] for result in results]), joined["output"])
    torch.testing.assert_close(torch.cat([result["input_grad"] for result in results]), joined["input_grad"])
    for name in ("weight_grad", "bias_grad"):
        torch.testing.assert_close(sum(result[name] for result in results), joined[name], rtol=1e-5, atol=1e-5)
    for result in results:
        torch.testing.assert_close(result["running_mean"], joined["running_mean"])
        torch.testing.assert_close(result["running_var"], joined["running_var"])


def _horovod_stack(width: int) -> Tensor:
    """Row r belongs to rank r: channel c counts up from (c + 1) r, or is (c + 1) r + 1."""
    start = torch.outer(torch.arange(4.0), torch.arange(1.0, 5.0))
    return start.unsqueeze(2) + (torch.arange(2.0) if width == 2 else torch.ones(1))


def _horovod_step(width: int) -> Results:
    row = _horovod_stack(width)[dist.get_rank() : dist.get_rank() + 1]
    return _step(SyncBatchNorm(4), row, torch.ones_like(row))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(nn.BatchNorm1d, (16, 8, 24)), (nn.BatchNorm2d, (16, 8, 24, 8)), (nn.BatchNorm3d, (16, 8, 4, 12, 6))],
    ids=["1d", "2d", "3d"],
)
def test_fvcore_precise_statistics_are_the_means_over_batches_however_often_they_come(
    kind: type[nn.Module], shape: tuple[int, ...]
) -> None:
    """As fvcore, tests/test_precise_bn.py, test_precise_bn: means of means and of variances."""
    batches = [_random(*shape, seed=seed) for seed in range(8)]
    layer = kind(8)
    weight = layer.get_parameter("weight").detach().clone()
    cycled = itertools.chain.from_iterable(itertools.repeat(batches, 3))
    apply_statistics(layer, population_statistics(layer, cycled, estimator=Estimator.MEAN_OF_BATCHES))
    axes = (0, *range(2, len(shape)))
    values = [batch.double().numpy() for batch in batches]
    np.testing.assert_allclose(
        layer.get_buffer("running_mean").numpy(), np.mean([v.mean(axes) for v in values], 0), rtol=1e-5, atol=1e-8
    )
    np.testing.assert_allclose(
        layer.get_buffer("running_var").numpy(), np.mean([v.var(axes, ddof=1) for v in values], 0), rtol=1e-5
    )
    assert torch.equal(layer.get_parameter("weight"), weight)


def test_torch_empty_inputs_on_one_rank_or_all_make_no_nan() -> None:
    """As pytorch, test/distributed/test_c10d_common.py, test_sync_batch_norm_only_empty_input."""
    assert run_ranks(2, _steps_with_empty_inputs, False) == [True, True]


def test_torch_empty_inputs_pass_through_a_network() -> None:
    """As pytorch, test/distributed/test_c10d_common.py, test_sync_batch_norm_empty_input: layers before and behind."""
    assert run_ranks(2, _steps_with_empty_inputs, True) == [True, True]


def _steps_with_empty_inputs(network: bool) -> bool:
    layers = [nn.Conv2d(2, 2, 3, 1, 1), nn.BatchNorm2d(2), nn.Linear(13, 4)] if network else [nn.BatchNorm2d(2)]
    model = DistributedDataParallel(nn.Sequential(*layers))
    convert_sync_batchnorm(model, dist.group.WORLD)
    some = torch.zeros(0 if dist.get_rank() == 0 else 3, 2, 11, 13)
    none = torch.zeros(0, 2, 11, 13)
    return all(_step_has_no_nan(model, x, wanted) for x in (some, none) for wanted in (True, False))


def _step_has_no_nan(model: nn.Module, x: Tensor, input_needs_gradient: bool) -> bool:
    output = model(x.clone().requires_grad_(input_needs_gradient))
    output.sum().backward()
    tensors = [output, *model.buffers(), *[p.grad for p in model.parameters() if p.grad is not None]]
    return all(tensor.isfinite().all() for tensor in tensors)


def test_torch_the_group_reaches_nested_layers() -> None:
    """As pytorch's test_SyncBatchNorm_process_group, with a nested model in the place of torchvision's."""
    assert run_ranks(2, _nested_groups) == [True, True]


def _nested_groups() -> bool:
    group = dist.new_group([0])
    block = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Sequential(nn.BatchNorm2d(2)))
    model = convert_sync_batchnorm(nn.Sequential(block, nn.Sequential(block, nn.BatchNorm1d(2))), group)
    found = [module.process_group for module in model.modules() if isinstance(module, SyncBatchNorm)]
    return len(found) == 2 and all(one is group for one in found)


def test_torch_training_communicates_and_evaluation_of_one_rank_does_not() -> None:
    """As pytorch's test_ddp_sync_bn_training_vs_eval, which torch skips; running statistics are off."""
    assert run_ranks(2, _collectives_of_training_and_evaluation) == [(6, 0), (6, 0)]


def _collectives_of_training_and_evaluation() -> tuple[int, int]:
    layer = SyncBatchNorm(2, momentum=0.99, track_running_stats=False)
    with CollectiveLog() as training:
        for _ in range(6):
            layer(torch.randn(10, 2, 4, 4)).sum().backward()
    layer.eval()
    with CollectiveLog() as evaluation:
        for _ in range(6 if dist.get_rank() == 0 else 0):
            layer(torch.randn(10, 2, 4, 4)).sum().backward()
    return len(training.collectives), len(evaluation.collectives)


@pytest.mark.parametrize("padding", [0.0, 0.1, 1.0, float("nan")])
def test_keras_masked_values_reach_no_statistic(padding: float) -> None:
    """As keras, .../batch_normalization_test.py, test_bachnorm_ignore_masked_values; here the variance is unbiased."""
    for running_mean, running_var in run_ranks(2, _train_masked, padding):
        torch.testing.assert_close(running_mean, torch.tensor([1.5, 5.0]))
        torch.testing.assert_close(running_var, torch.tensor([0.25 * 20 / 19, 0.0]))


def _train_masked(padding: float) -> tuple[Tensor, Tensor]:
    """Ten sequences of two steps, padded to four; seven on rank 0."""
    number = (7, 3)[dist.get_rank()]
    x = torch.tensor([[1.0, 2.0, padding, padding], [5.0, 5.0, padding, padding]]).repeat(number, 1, 1)
    layer = SyncBatchNorm(2, momentum=1.0)
    layer(x, torch.tensor([True, True, False, False]).repeat(number, 1))
    return layer.get_buffer("running_mean"), layer.get_buffer("running_var")


def test_keras_a_wholly_masked_input_gives_zeros() -> None:
    """As keras, .../batch_normalization_test.py, test_input_fully_masked, synchronized."""
    for output, running_var in run_ranks(2, _train_wholly_masked):
        assert torch.equal(output, torch.zeros(4, 5))
        assert torch.equal(running_var, torch.ones(5))


def _train_wholly_masked() -> tuple[Tensor, Tensor]:
    layer = SyncBatchNorm(5, affine=False)
    return layer(torch.zeros(4, 5), torch.zeros(4, dtype=torch.bool)), layer.get_buffer("running_var")


@pytest.mark.parametrize("num_dims", [1, 2, 3], ids=["by-sample", "by-row", "by-position"])
def test_keras_a_mask_of_the_first_dimensions_counts_for_all_behind(num_dims: int) -> None:
    """As keras, .../batch_normalization_test.py, test_masked_broadcast_normalization; of more than ones."""
    x, dy, mask = _image_batch(num_dims)
    rows, dys = (values.movedim(1, -1)[mask].reshape(-1, 4) for values in (x, dy))
    expected = reckon(rows, dys, torch.ones(4), torch.zeros(4))
    results = run_ranks(2, _train_with_mask_of_first_dimensions, num_dims)
    for name, values in (("output", expected.output), ("input_grad", expected.input_grad)):
        actual = torch.cat([result[name] for result in results]).movedim(1, -1)
        _close(actual[mask].reshape(-1, 4), values, 1e-5)
        assert actual[~mask].count_nonzero() == 0
    for result in results:
        _close(result["running_mean"], expected.mean, 1e-5)
        _close(result["running_var"], expected.unbiased_var, 1e-5)


def _image_batch(num_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    x, dy = _random(5, 4, 3, 2), _random(5, 4, 3, 2, seed=3)
    mask = _random(5, 3, 2, seed=4) > 0.3
    return x, dy, mask[(slice(None),) * num_dims + (0,) * (3 - num_dims)]


def _train_with_mask_of_first_dimensions(num_dims: int) -> Results:
    """Two samples on rank 0 and three on rank 1."""
    x, dy, mask = (torch.split(values, [2, 3])[dist.get_rank()] for values in _image_batch(num_dims))
    layer = SyncBatchNorm(4, momentum=1.0)
    x = x.clone().requires_grad_()
    output = layer(x, mask)
    output.backward(dy)
    assert x.grad is not None
    return {"output": output.detach(), "input_grad": x.grad, **dict(layer.named_buffers())}


def test_keras_evaluation_is_training_where_the_batch_is_all_that_was_tracked() -> None:
    """As keras, .../batch_normalization_test.py, test_correctness: three times in a row, on two ranks."""
    for results in run_ranks(2, _normalize_three_times):
        _close(results["mean"], 0.0, 1e-3)
        _close(results["std"], 1.0, 1e-3)
        _close(results["running_mean"], 0.0, 1e-3)
        _close(results["evaluated"], results["trained"].numpy(), 2e-2)
        assert not torch.allclose(results["before"], results["trained"])


def _normalize_three_times() -> Results:
    x = (_random(10, 3, 5, 4) * 10 + 5)[slice(5 * dist.get_rank(), 5 * dist.get_rank() + 5)]
    layer = SyncBatchNorm(3, momentum=1.0)
    before = layer.eval()(x)
    layer.train()
    output = layer(layer(layer(x)))
    means = torch.stack([output.mean((0, 2, 3)), output.square().mean((0, 2, 3))]).detach() / 2
    dist.all_reduce(means)
    results = {"mean": means[0], "std": means[1].sqrt(), "running_mean": layer.get_buffer("running_mean").clone()}
    trained = layer(x)
    # Unbiased variances are tracked: of 100 values each, they are one in a hundred above the batch's.
    return {name: value.detach() for name, value in results.items()} | {
        "before": before.detach(),
        "trained": trained.detach(),
        "evaluated": layer.eval()(x).detach(),
    }


def test_keras_what_is_not_trainable_uses_and_keeps_its_statistics() -> None:
    """As keras, .../batch_normalization_test.py, test_trainable_behavior: fixed, then trained again, then compared."""
    layer = SyncBatchNorm(3, momentum=0.2, eps=1e-10)
    x = _random(200, 3, 4) * 2 + 5
    freeze(layer)
    for _ in range(10):
        torch.testing.assert_close(layer.train()(x), x)
    unfreeze(layer)
    for _ in range(60):
        layer(x)
    freeze(layer)
    y = layer.train()(x)
    np.testing.assert_allclose(y.mean((0, 2)).detach().numpy(), np.zeros(3), atol=1e-3)
    np.testing.assert_allclose(y.std((0, 2)).detach().numpy(), np.ones(3), atol=1e-3)


def test_flax_nan_in_the_padding_does_not_leak() -> None:
    """As flax, tests/linen/linen_test.py, test_batch_norm with a mask: valid positions as if there were no others."""
    x, dy = _random(4, 3, 2), _random(4, 3, 2, seed=3)
    expected = reckon(x, dy, torch.ones(3), torch.zeros(3))
    results = run_ranks(2, _train_on_padded)
    for name, values in (("output", expected.output), ("input_grad", expected.input_grad)):
        valid = torch.cat([result[name][:, :, 1:] for result in results])
        _close(valid, values, 1e-5)
        assert all(torch.equal(result[name][:, :, 0], torch.zeros(2, 3)) for result in results)
    for result in results:
        _close(result["running_mean"], 0.1 * expected.mean, 1e-6)
        _close(result["running_var"], 0.9 + 0.1 * expected.unbiased_var, 1e-6)


def _train_on_padded() -> Results:
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    padding = torch.full((2, 3, 1), torch.nan)
    x = torch.cat([padding, _random(4, 3, 2)[rows]], 2)
    dy = torch.cat([padding, _random(4, 3, 2, seed=3)[rows]], 2)
    results = _step(Masked(SyncBatchNorm(3)), x, dy)
    return {name.removeprefix("norm."): value for name, value in results.items()}


class Masked(nn.Module):
    """Passes the mask of everything but the first position."""

    def __init__(self, norm: SyncBatchNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        valid = torch.tensor([False, True, True]).expand(x.size(0), -1)
        output: Tensor = self.norm(x, valid)
        return output


def test_flax_normalizing_twice_is_normalizing_once() -> None:
    """As flax, tests/linen/linen_test.py, test_batch_norm_multi_init: one layer in two places of a forward."""
    for once, twice in run_ranks(2, _normalize_twice):
        torch.testing.assert_close(once, twice, rtol=0.005, atol=1e-5)


def _normalize_twice() -> tuple[Tensor, Tensor]:
    layer = SyncBatchNorm(4)
    once = layer(_random(2, 4, seed=dist.get_rank()))
    return once.detach(), layer(once).detach()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_detectron2_a_frozen_layer_keeps_half_precision_under_autocast(dtype: torch.dtype) -> None:
    """As detectron2, tests/layers/test_blocks.py, test_frozen_batchnorm_fp16: with gradients and without."""
    layer = FrozenBatchNorm(4)
    images = _random(2, 4, 3, 3).to(dtype)
    for grad in (True, False):
        with torch.autocast("cpu", dtype=dtype), torch.set_grad_enabled(grad):
            output = layer(images.requires_grad_(grad))
        assert output.dtype is dtype
        torch.testing.assert_close(output, images, rtol=1e-2, atol=1e-2)
