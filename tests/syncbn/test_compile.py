"""Compiled whole, the layer gives the outputs, gradients and buffers of one process, and still talks once each way."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Any

import onnx.reference
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from syncbn import SyncBatchNorm
from tests.ranks import run_ranks

F64 = torch.float64


Sizes = tuple[tuple[int, ...], ...]
"""How many rows each rank has, by step."""


def _batches(sizes: Sizes) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(8)
    pairs = [torch.randn(2, sum(step), 4, 3, generator=generator, dtype=F64) for step in sizes]
    return [(x * 3 + 1, dy) for x, dy in pairs]


def _train(forward: Callable[[Tensor], Tensor], layer: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[Any]:
    """By step outputs and input gradients, then the parameters' gradients and the buffers."""
    steps = []
    for x, dy in batches:
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        torch.autograd.backward(y, dy)
        steps += [y.detach(), leaf.grad]
    return [steps, [parameter.grad for parameter in layer.parameters()], list(layer.buffers())]


def _compile(layer: nn.Module, backend: str) -> Callable[..., Tensor]:
    # The compiler itself uses what torch says is deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    compiled: Callable[..., Tensor] = torch.compile(layer, fullgraph=True, backend=backend)
    return compiled


def _train_compiled(sizes: Sizes, momentum: float | None, backend: str) -> list[Any]:
    torch._inductor.config.compile_threads = 1  # no processes of its own
    torch._inductor.config.cpp_cache_precompile_headers = False  # nor files outside its cache folder
    layer = SyncBatchNorm(4, momentum=momentum, dtype=F64)
    compiled = _compile(layer, backend)
    rank = dist.get_rank()
    shards = [
        (torch.split(x, list(step))[rank], torch.split(dy, list(step))[rank])
        for step, (x, dy) in zip(sizes, _batches(sizes), strict=True)
    ]
    return _train(compiled, layer, shards)


def _check(sizes: Sizes, momentum: float | None, backend: str) -> None:
    layer = nn.BatchNorm1d(4, momentum=momentum, dtype=F64)
    steps, grads, buffers = _train(layer, layer, _batches(sizes))
    ranks = run_ranks(len(sizes[0]), _train_compiled, sizes, momentum, backend, timeout_s=110.0)
    for place, expected in enumerate(steps):
        joined = torch.cat([rank[0][place] for rank in ranks])
        torch.testing.assert_close(joined, expected, rtol=1e-10, atol=1e-10)
    for place, expected in enumerate(grads):
        total = torch.stack([rank[1][place] for rank in ranks]).sum(0)
        torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-10)
    for rank in ranks:
        for actual, expected in zip(rank[2], buffers, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("sizes", "momentum"),
    [
        (((4,), (6,)), 0.1),
        (((4,), (6,)), None),
        (((4, 3), (2, 5), (3, 0), (1, 6), (0, 2)), 0.1),
        (((3, 0, 2), (0, 4, 1)), None),
        (((1, 2, 0, 3),), 0.1),
    ],
    ids=["1", "1-cumulative", "2", "3-cumulative", "4"],
)
def test_a_layer_compiled_whole_trains_as_one_process(sizes: Sizes, momentum: float | None) -> None:
    """Sizes change between steps, also to none and one."""
    _check(sizes, momentum, "aot_eager")


@pytest.mark.skipif(which("g++") is None, reason="inductor needs a C++ compiler, and there is no g++")
def test_inductor_trains_two_ranks_as_one_process() -> None:
    _check(((4, 3), (4, 3)), 0.1, "inductor")


def _num_collectives() -> int:
    """Those that this rank has started in the default group so far."""
    assert dist.group.WORLD is not None
    number: int = dist.group.WORLD._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return number


def _collectives_and_masks() -> tuple[int, int]:
    """Collectives of a compiled step with a mask, forward and backward, whose results are those of eager mode."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x, mask = torch.randn(3, 4, 5, generator=generator), torch.rand(3, 5, generator=generator) < 0.5
    layer, eager = SyncBatchNorm(4), SyncBatchNorm(4)
    compiled = _compile(layer, "aot_eager")
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    with torch.no_grad():
        eager(x, mask), compiled(x, mask)
    torch.autograd.backward(compiled(leaves[0], mask).square().sum())  # compiles; what follows is the compiled code
    leaves[0].grad = None
    counts = [_num_collectives()]
    y = compiled(leaves[0], mask)
    counts.append(_num_collectives())
    torch.autograd.backward(y.square().sum())
    counts.append(_num_collectives())
    for _ in range(2):
        expected = eager(leaves[1], mask)
    torch.autograd.backward(expected.square().sum())
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-5, atol=1e-5)
    for actual, wanted in zip(layer.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)
    return counts[1] - counts[0], counts[2] - counts[1]


def test_a_compiled_step_exchanges_once_each_way() -> None:
    assert run_ranks(2, _collectives_and_masks) == [(1, 1)] * 2


@dataclass(frozen=True)
class Setting:
    """What a compiled step meets."""

    shape: tuple[int, ...]
    memory_format: torch.memory_format = torch.contiguous_format
    autocast: torch.dtype | None = None


SETTINGS = [
    Setting((3, 4), autocast=torch.float16),
    Setting((3, 4, 5, 6), torch.channels_last, autocast=torch.bfloat16),
    Setting((2, 4, 3, 2, 5), torch.channels_last_3d),
]


def test_autocast_and_memory_formats_compile_to_what_eager_mode_does() -> None:
    assert all(run_ranks(2, _step_in_settings))


def _step_in_settings() -> bool:
    for setting in SETTINGS:
        model = nn.Sequential(nn.Linear(setting.shape[-1], setting.shape[-1]), SyncBatchNorm(4))
        if len(setting.shape) == 2:
            model = nn.Sequential(nn.Linear(4, 4), SyncBatchNorm(4))
        expected = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(dist.get_rank())
        x = torch.randn(setting.shape, generator=generator).contiguous(memory_format=setting.memory_format)
        with torch.autocast("cpu", setting.autocast, enabled=setting.autocast is not None):
            outputs = [_compile(model, "aot_eager")(x), expected(x)]
        tolerance = 1e-5 if setting.autocast is None else 4 * torch.finfo(setting.autocast).eps
        torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)
        assert outputs[0].stride() == outputs[1].stride()
        for output in outputs:
            torch.autograd.backward(output.float().pow(3).sum())
        tensors = [[*(p.grad for p in m.parameters()), *m.buffers()] for m in (model, expected)]
        for actual, wanted in zip(*tensors, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=30 * tolerance)
    return True


def test_a_compiled_layer_that_is_checkpointed_counts_once() -> None:
    for num_batches, mean, grad, expected in run_ranks(2, _checkpoint_compiled):
        assert num_batches == 2
        for actual, wanted in zip((mean, grad), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


def _checkpoint_compiled() -> tuple[int, Tensor, Tensor | None, tuple[Tensor, Tensor | None]]:
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(dist.get_rank()), dtype=F64).requires_grad_()
    layer, eager = SyncBatchNorm(4, dtype=F64), SyncBatchNorm(4, dtype=F64)
    compiled = _compile(layer, "aot_eager")
    results = []
    for forward, module in ((compiled, layer), (eager, eager)):
        for use_reentrant in (False, True):
            x.grad = None
            torch.autograd.backward(checkpoint(forward, x, use_reentrant=use_reentrant).pow(3).sum())
        results.append((module.get_buffer("running_mean"), x.grad))
    return int(layer.get_buffer("num_batches_tracked")), *results[0], results[1]


def _train_on_one_value() -> str:
    compiled = _compile(SyncBatchNorm(4), "aot_eager")
    with pytest.raises(RuntimeError, match="more than one value") as error:
        compiled(torch.randn(1 - dist.get_rank(), 4))
    return str(error.value)


def test_compiled_too_few_values_still_raise_on_every_rank() -> None:
    assert all("enlarge the batch" in message for message in run_ranks(2, _train_on_one_value))


def _trained() -> SyncBatchNorm:
    layer = SyncBatchNorm(4)
    layer(torch.randn(6, 4, 3))
    return layer.eval()


def test_compiled_evaluation_is_torchs_and_never_communicates() -> None:
    assert run_ranks(2, _evaluate_compiled) == [0, 0]


def _evaluate_compiled() -> int:
    layer, x = _trained(), torch.randn(3, 4, 5)
    compiled = _compile(layer, "aot_eager")
    expected = nn.functional.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
    before = _num_collectives()
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-6)
    return _num_collectives() - before


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_an_exported_layer_is_plain_batch_norm(strict: bool) -> None:
    layer, x = _trained(), torch.randn(3, 4, 5)
    program = torch.export.export(layer, (x,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["aten.batch_norm.default"]
    torch.testing.assert_close(program.module()(x), layer(x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")  # torch's exporter, of torch itself
def test_an_onnx_model_holds_plain_batch_normalization(tmp_path: Path) -> None:
    layer, x = _trained(), torch.randn(3, 4, 5)
    torch.onnx.export(layer, (x,), tmp_path / "layer.onnx", dynamo=True)
    model = onnx.load(tmp_path / "layer.onnx")
    assert [node.op_type for node in model.graph.node] == ["BatchNormalization"]
    (output,) = onnx.reference.ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), layer(x), rtol=0, atol=1e-6)
