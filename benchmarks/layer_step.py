"""What synchronizing costs a training step: ResNet-20 under DistributedDataParallel, gloo, one thread a rank.

Three models in one process group take one step each a round, in turns: with torch's BatchNorm, which does not
synchronize (local), with the plain formula (naive, `benchmarks.naive_sync_batchnorm`) and with ours. The overhead is
``(ours - local) / (naive - local)``: which share is left of what synchronizing costs otherwise, the network's own
work taken off. The same of the ranks' processor time leaves out waiting, and holds on a machine with other work too.
Before anything is timed, naive and ours must equal one process with the joined batch, in float64.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.naive_sync_batchnorm import with_naive_layers
from benchmarks.peak_memory import peak_memory
from benchmarks.record import record, spread
from service.training.resnet import ResNet20
from syncbn import convert_sync_batchnorm
from tests.ranks import run_ranks
from tests.syncbn.collectives import CollectiveLog

BATCH_SIZES = (16, 64)
"""Images a rank."""

NUM_WARMUP = 2
NUM_ROUNDS = 20
TOLERANCE = 1e-8
"""Of gradients and buffers in float64, relative to the largest of their tensor."""

_LIMIT_S = 600.0
_MIB = 2**20

VARIANTS: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "local": lambda model: model,
    "naive": with_naive_layers,
    "ours": convert_sync_batchnorm,
}


def main() -> None:
    """Two ranks, or as many as asked for; the figures of other numbers are kept beside those of two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    arguments = parser.parse_args()
    figures = {
        f"batch_{size}": _figures(run_ranks(arguments.world_size, _rank, size, arguments.rounds, timeout_s=_LIMIT_S))
        for size in BATCH_SIZES
    }
    suffix = "" if arguments.world_size == 2 else f"_{arguments.world_size}_ranks"
    record(
        "layer_step",
        figures,
        suffix=suffix,
        model="ResNet20, 32x32 images, 19 BatchNorm layers, contiguous float32",
        world_size=arguments.world_size,
        rounds=arguments.rounds,
        threads_per_rank=1,
        checked=f"naive and ours equal one process with the joined batch in float64, to {TOLERANCE:g}",
    )


class _Rank:
    """What one rank measured: by variant the seconds of each round, and a step's collectives and memory."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        self.processor_s: dict[str, list[float]] = {name: [] for name in VARIANTS}
        self.num_collectives: dict[str, int] = {}
        self.peak_mib: dict[str, float] = {}


def _figures(ranks: Sequence[_Rank]) -> dict[str, object]:
    """A round lasts as long as its slowest rank."""
    seconds = {
        name: [max(round_) for round_ in zip(*(rank.seconds[name] for rank in ranks), strict=True)] for name in VARIANTS
    }
    processor_s = {
        name: [sum(round_) for round_ in zip(*(rank.processor_s[name] for rank in ranks), strict=True)]
        for name in VARIANTS
    }
    rounds = list(zip(*seconds.values(), strict=True))
    return {
        "overhead": spread([_overhead(*round_) for round_ in rounds]),
        "overhead_of_processor_time": spread(
            [_overhead(*round_) for round_ in zip(*processor_s.values(), strict=True)]
        ),
        "ours_over_local": spread([ours / local for local, _, ours in rounds]),
        "ours_over_naive": spread([ours / naive for _, naive, ours in rounds]),
        "step_ms": {name: spread([1e3 * value for value in values]) for name, values in seconds.items()},
        "collectives_per_step": ranks[0].num_collectives,
        "peak_mib": ranks[0].peak_mib,
    }


def _overhead(local: float, naive: float, ours: float) -> float:
    return (ours - local) / (naive - local)


def _rank(batch_size: int, num_rounds: int) -> _Rank:
    _check_equals_one_process(batch_size)
    images, labels = _shard(*_joined_batch(batch_size))
    steps = {name: partial(_step, _distributed(name), images, labels) for name in VARIANTS}
    measured = _Rank()
    for name, step in steps.items():
        measured.peak_mib[name] = round(peak_memory(step) / _MIB, 1)
        with CollectiveLog() as log:
            step()
        measured.num_collectives[name] = len(log.collectives)
    names = list(VARIANTS)
    for number in range(NUM_WARMUP + num_rounds):
        for name in names[number % 3 :] + names[: number % 3]:  # each comes as often after each of the others
            dist.barrier()
            start, processor_start = time.perf_counter(), time.process_time()
            steps[name]()
            if number >= NUM_WARMUP:
                measured.seconds[name].append(time.perf_counter() - start)
                measured.processor_s[name].append(time.process_time() - processor_start)
    return measured


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Forward and backward, gradients averaged; without an optimizer, whose time is the same for all."""
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]


def _distributed(name: str, dtype: torch.dtype = torch.float32) -> DistributedDataParallel:
    # Buffers are alike on all ranks where they matter, so that sending them would be time lost.
    return DistributedDataParallel(VARIANTS[name](_network().to(dtype)), forward_sync_buffers=False)


def _network() -> ResNet20:
    torch.manual_seed(0)
    return ResNet20(num_channels=3, num_classes=10)


def _joined_batch(batch_size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    num_images = batch_size * dist.get_world_size()
    images = torch.randn(num_images, 3, 32, 32, generator=generator)
    return images, torch.randint(10, (num_images,), generator=generator)


def _shard(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return images.chunk(world_size)[rank], labels.chunk(world_size)[rank]


def _check_equals_one_process(batch_size: int) -> None:
    """Gradients and running statistics of one step; raises AssertionError naming what differs."""
    images, labels = _joined_batch(batch_size)
    images = images.double()
    joined = _network().double()
    _step(joined, images, labels)
    for name in ("naive", "ours"):
        model = _distributed(name, torch.float64)
        _step(model, *_shard(images, labels))
        for (path, parameter), reference in zip(model.module.named_parameters(), joined.parameters(), strict=True):
            assert parameter.grad is not None
            assert reference.grad is not None
            _check_close(f"{name}: gradient of {path}", parameter.grad, reference.grad)
        for (path, buffer), expected in zip(model.module.named_buffers(), joined.buffers(), strict=True):
            if buffer.is_floating_point():
                _check_close(f"{name}: {path}", buffer, expected)


def _check_close(what: str, actual: Tensor, expected: Tensor) -> None:
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error <= TOLERANCE, f"{what} is off by {error:.1e}"


if __name__ == "__main__":
    main()
