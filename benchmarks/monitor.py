"""What watching the BatchNorm layers costs a training step: ResNet-20 on 32x32 images, gloo, one thread a rank.

In one process group the same model takes three kinds of steps in turns: without a monitor (plain), with one whose
sample is not due (idle), and with one whose sample is due (sampled). A round lasts as long as its slowest rank, and a
ratio is of one round. What a run pays is ``1 + (sampled / plain - 1) / every``. The same of the ranks' processor time
leaves out waiting, and holds on a machine with other work too.
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

from benchmarks.record import record, spread
from service.training.resnet import ResNet20
from syncbn import convert_sync_batchnorm
from syncbn.monitor import BatchNormMonitor
from tests.ranks import run_ranks

BATCH_SIZE = 64
"""Images a rank."""

WORLD_SIZE = 2
EVERY = 20
NUM_WARMUP = 5  # samples, before ranks are judged
NUM_ROUNDS = 15
KINDS = ("plain", "idle", "sampled")

_LIMIT_S = 550.0

_Times = dict[str, list[tuple[float, float]]]
"""By kind of step, seconds and processor seconds of each round."""


def main() -> None:
    """Two ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    rounds = parser.parse_args().rounds
    ranks = run_ranks(WORLD_SIZE, _rank, rounds, timeout_s=_LIMIT_S)
    seconds = {kind: [max(times) for times in _by_round(ranks, kind, 0)] for kind in KINDS}
    processor_s = {kind: [sum(times) for times in _by_round(ranks, kind, 1)] for kind in KINDS}
    record(
        "monitor",
        {
            "step_ms": {kind: spread([1e3 * value for value in values]) for kind, values in seconds.items()},
            "clock": _ratios(seconds),
            "processor_time": _ratios(processor_s),
        },
        model="ResNet20, 32x32 images, 19 synchronized BatchNorm layers, contiguous float32, SGD",
        world_size=WORLD_SIZE,
        batch_size_per_rank=BATCH_SIZE,
        every=EVERY,
        rounds=rounds,
        threads_per_rank=1,
    )


def _ratios(times: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    sampled = [sampled / plain for sampled, plain in zip(times["sampled"], times["plain"], strict=True)]
    return {
        "sampled_over_plain": spread(sampled),
        "idle_over_plain": spread([idle / plain for idle, plain in zip(times["idle"], times["plain"], strict=True)]),
        "run_over_plain": spread([1 + (ratio - 1) / EVERY for ratio in sampled]),
    }


def _by_round(ranks: Sequence[_Times], kind: str, which: int) -> list[tuple[float, ...]]:
    return list(zip(*([times[which] for times in rank[kind]] for rank in ranks), strict=True))


def _rank(num_rounds: int) -> _Times:
    torch.manual_seed(dist.get_rank())
    images, labels = torch.randn(BATCH_SIZE, 3, 32, 32), torch.randint(10, (BATCH_SIZE,))
    model = DistributedDataParallel(convert_sync_batchnorm(ResNet20(3, 10)), forward_sync_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    monitors = {
        "plain": None,
        "idle": BatchNormMonitor(model, every=10**9),
        "sampled": BatchNormMonitor(model, every=2),
    }
    measured: _Times = {kind: [] for kind in KINDS}
    for number in range(NUM_WARMUP + num_rounds):
        for kind, monitor in monitors.items():
            if kind == "sampled" and monitor is not None:
                monitor.step()  # the next one is due
            times = _timed(partial(_step, model, optimizer, images, labels, monitor))
            if number >= NUM_WARMUP:
                measured[kind].append(times)
    return measured


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, monitor: BatchNormMonitor | None
) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    if monitor is not None:
        monitor.step()


def _timed(step: Callable[[], object]) -> tuple[float, float]:
    dist.barrier()
    start, processor_start = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - start, time.process_time() - processor_start


if __name__ == "__main__":
    main()
