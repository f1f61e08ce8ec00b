"""What the layer's own arithmetic costs without any exchange, forward and backward, against torch's.

On a CPU, with one thread: ours over a group of none against `F.batch_norm`, which fuses statistics and normalization
where ours must leave room for the exchange between them. Time is the processor's, which on an idle machine is the
clock's. Disturbances only add to it, so that the fastest round of each is compared, beside the rounds one by one.
Freed memory is kept, because else page faults, which may hit either, outweigh the arithmetic. On a GPU, where there is
one: ours against the function behind torch's SyncBatchNorm, both made to synchronize over a group of one rank. Before
that, ours must keep a variance to 1e-5 at a mean of 1e4 standard deviations.
"""

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncBatchNorm  # what its layer calls from two ranks on

from benchmarks.record import record, spread
from syncbn.functional import batch_norm_over
from syncbn.kernels.aten import local_moments

NUM_WARMUP = 2
NUM_ROUNDS = 15
FAR = 1e4
"""Of the accuracy gate: the mean in standard deviations."""

TOLERANCE = 1e-5
"""Of the variance there, relative to float64 over the same values."""

SHAPES = ((16, 64, 56, 56), (32, 256, 14, 14), (8, 2048, 7, 7), (64, 128, 28, 28), (256, 100), (4, 32, 16, 64, 64))
GPU_SHAPES = ((256, 64, 112, 112), (64, 128, 28, 28), (32, 256, 14, 14), (8, 2048, 7, 7), (256, 100))

_MEMORY_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
_TINY = 1 << 16  # values; below it, calls cost more than arithmetic
_VALUES_PER_ROUND = 2_000_000  # so that a small case's round is not a single step
_EPS, _MOMENTUM = 1e-5, 0.1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT_BYTES = 1 << 30


@dataclass(frozen=True)
class Case:
    """An input of the layer."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{'x'.join(map(str, self.shape))} {layout} {str(self.dtype).removeprefix('torch.')}"

    @property
    def is_tiny(self) -> bool:
        """Whether calls cost more than arithmetic."""
        return math.prod(self.shape) < _TINY

    @property
    def steps_per_round(self) -> int:
        """How often a round repeats forward and backward."""
        return max(1, _VALUES_PER_ROUND // math.prod(self.shape))

    def values(self, device: str, mean: float = 0.0) -> Tensor:
        """Random ones, of standard deviation 1."""
        values = torch.randn(self.shape, generator=torch.Generator().manual_seed(0)).add_(mean).to(device, self.dtype)
        return values.to(memory_format=_MEMORY_FORMATS[len(self.shape)]) if self.channels_last else values


class Layer:
    """Input, parameters and buffers of one batch normalization, and the ways to compute it."""

    def __init__(self, case: Case, device: str) -> None:
        num_channels = case.shape[1]
        self.input = case.values(device).requires_grad_()
        self.grad_output = torch.randn_like(self.input)
        self.weight = torch.ones(num_channels, device=device, requires_grad=True)
        self.bias = torch.zeros(num_channels, device=device, requires_grad=True)
        self.mean = torch.zeros(num_channels, device=device)
        self.var = torch.ones(num_channels, device=device)

    def step(self, forward: Callable[[], Tensor]) -> None:
        """Forward and backward; gradients are not kept, for in a network those of inputs are not either."""
        torch.autograd.grad(forward(), (self.input, self.weight, self.bias), self.grad_output)

    def torchs(self) -> Tensor:
        """Without synchronization."""
        return F.batch_norm(self.input, self.mean, self.var, self.weight, self.bias, True, _MOMENTUM, _EPS)

    def ours(self, group: dist.ProcessGroup | None = None) -> Tensor:
        """With synchronization, as far as there is a group."""
        return batch_norm_over(
            group, self.input, self.mean, self.var, self.weight, self.bias, None, None, _MOMENTUM, _EPS
        )

    def torchs_synchronized(self, group: dist.ProcessGroup) -> Tensor:
        """With synchronization, also over a group of one."""
        output: Tensor = TorchSyncBatchNorm.apply(  # type: ignore[no-untyped-call]
            self.input, self.weight, self.bias, self.mean, self.var, _EPS, _MOMENTUM, group, group.size()
        )
        return output


def main() -> None:
    """The processor's figures, and a GPU's where there is one; what is left out is said."""
    torch.set_num_threads(1)
    _keep_freed_memory()
    figures = {"accuracy": _checked_accuracy(), "cpu": _cpu_figures(), "gpu": _gpu_figures()}
    record("layer_kernels", figures, rounds=NUM_ROUNDS, threads=1, compared="forward and backward, ours over torch's")


def cases(shapes: Iterable[tuple[int, ...]]) -> list[Case]:
    """Every shape in float32 and bfloat16, contiguous and, where it has positions, with channels last."""
    return [
        Case(shape, dtype, channels_last)
        for shape in shapes
        for dtype in (torch.float32, torch.bfloat16)
        for channels_last in (False, True)
        if len(shape) > 2 or not channels_last
    ]


def _keep_freed_memory() -> None:
    """Tell glibc not to give memory back to the system; elsewhere nothing is done."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            assert libc.mallopt(parameter, _KEPT_BYTES) == 1


def _checked_accuracy() -> dict[str, object]:
    """Relative errors of the variance far from zero; raises AssertionError if one is too large or an output not finite.

    In float32 only: bfloat16 cannot hold such values.
    """
    errors = {}
    for case in (case for case in cases(SHAPES) if case.dtype == torch.float32):
        x = case.values("cpu", FAR)
        expected = x.double().var([dim for dim in range(x.dim()) if dim != 1], correction=0)
        errors[str(case)] = float(((local_moments(x).var - expected) / expected).abs().max())
        assert errors[str(case)] <= TOLERANCE, f"{case}: the variance is off by {errors[str(case)]:.1e}"
        output = batch_norm_over(None, x, None, None, None, None, None, None, 0.0, _EPS)
        assert output.isfinite().all(), f"{case}: an output is not finite"
    return {"mean_over_std": FAR, "largest_variance_error": max(errors.values())}


def _cpu_figures() -> dict[str, object]:
    ratios = {}
    for case in cases(SHAPES):
        layer = Layer(case, "cpu")
        steps = [partial(layer.step, layer.torchs), partial(layer.step, layer.ours)]
        rounds = _rounds(steps, case.steps_per_round, time.thread_time)
        ratios[case] = _ratio(rounds)
    return _summary(ratios)


def _gpu_figures() -> dict[str, object] | str:
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        print("skipped: the GPU's figures, for torch finds no GPU with NCCL on this machine")
        return "skipped: no GPU with NCCL"
    store = dist.HashStore()  # type: ignore[attr-defined]  # public, yet not marked as exported
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        assert dist.group.WORLD is not None
        return {"name": torch.cuda.get_device_name(), **_gpu_ratios(dist.group.WORLD)}
    finally:
        dist.destroy_process_group()


def _gpu_ratios(group: dist.ProcessGroup) -> dict[str, object]:
    """By the host's clock around a synchronized device: torch's layer waits for the device, which only that shows."""
    ratios = {}
    for case in cases(GPU_SHAPES):
        layer = Layer(case, "cuda")
        steps = [
            partial(layer.step, partial(layer.torchs_synchronized, group)),
            partial(layer.step, partial(layer.ours, group)),
        ]
        rounds = _rounds(steps, max(20, case.steps_per_round), _synchronized_clock)
        ratios[case] = _ratio(rounds)
    return _summary(ratios)


def _synchronized_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _rounds(steps: Iterable[Callable[[], Any]], num_steps: int, clock: Callable[[], float]) -> list[tuple[float, ...]]:
    """Seconds of ``num_steps`` of each of ``steps``, in turns, by round."""
    rounds = [tuple(_seconds(step, num_steps, clock) for step in steps) for _ in range(NUM_WARMUP + NUM_ROUNDS)]
    return rounds[NUM_WARMUP:]


def _seconds(step: Callable[[], Any], num_steps: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(num_steps):
        step()
    return clock() - start


def _ratio(rounds: list[tuple[float, ...]]) -> dict[str, float]:
    """Ours over torch's: of the fastest rounds, and spread over rounds."""
    torchs, ours = zip(*rounds, strict=True)
    return {"of_fastest": min(ours) / min(torchs), **spread([ours / torchs for torchs, ours in rounds])}


def _summary(ratios: dict[Case, dict[str, float]]) -> dict[str, object]:
    """Tiny inputs are told apart: there calls are what costs."""
    summary: dict[str, object] = {}
    for figure in ("of_fastest", "median"):
        large = [ratio[figure] for case, ratio in ratios.items() if not case.is_tiny]
        tiny = [ratio[figure] for case, ratio in ratios.items() if case.is_tiny]
        summary[figure] = {
            "geometric_mean_but_tiny": statistics.geometric_mean(large),
            "worst_but_tiny": max(large),
            "worst_tiny": max(tiny),
        }
    return summary | {"ratios": {str(case): ratio for case, ratio in ratios.items()}}


if __name__ == "__main__":
    main()
