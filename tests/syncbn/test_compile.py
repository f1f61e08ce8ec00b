"""Compiled whole, the layer gives the outputs, gradients and buffers of one process, and still talks once each way."""

import warnings
from collections.abc import Callable
from pathlib import Path
from shutil import which
from typing import Any

import onnx.reference
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn import SyncBatchNorm
from tests.ranks import run_ranks

F64 = torch.float64


def _batches(sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(8)
    shape = (2, 2, sum(sizes), 4, 3)
    return [(x * 3 + 1, dy) for x, dy in torch.randn(shape, generator=generator, dtype=F64)]


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


def _train_compiled(sizes: tuple[int, ...], momentum: float | None, backend: str) -> list[Any]:
    torch._inductor.config.compile_threads = 1  # no processes of its own
    torch._inductor.config.cpp_cache_precompile_headers = False  # nor files outside its cache folder
    layer = SyncBatchNorm(4, momentum=momentum, dtype=F64)
    compiled = _compile(layer, backend)
    rank = dist.get_rank()
    parts = [[torch.split(part, list(sizes))[rank] for part in batch] for batch in _batches(sizes)]
    return _train(compiled, layer, [(x, dy) for x, dy in parts])


def _check(sizes: tuple[int, ...], momentum: float | None, backend: str) -> None:
    layer = nn.BatchNorm1d(4, momentum=momentum, dtype=F64)
    steps, grads, buffers = _train(layer, layer, _batches(sizes))
    ranks = run_ranks(len(sizes), _train_compiled, sizes, momentum, backend, timeout_s=110.0)
    for place, expected in enumerate(steps):
        joined = torch.cat([rank[0][place] for rank in ranks])
        torch.testing.assert_close(joined, expected, rtol=1e-10, atol=1e-10)
    for place, expected in enumerate(grads):
        total = torch.stack([rank[1][place] for rank in ranks]).sum(0)
        torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-10)
    for rank in ranks:
        for actual, expected in zip(rank[2], buffers, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("sizes", [(4,), (4, 3), (3, 0)], ids=["1", "2", "2-empty"])
def test_a_layer_compiled_whole_trains_as_one_process(sizes: tuple[int, ...], momentum: float | None) -> None:
    _check(sizes, momentum, "aot_eager")


@pytest.mark.skipif(which("g++") is None, reason="inductor needs a C++ compiler, and there is no g++")
def test_inductor_trains_two_ranks_as_one_process() -> None:
    _check((4, 3), 0.1, "inductor")


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
