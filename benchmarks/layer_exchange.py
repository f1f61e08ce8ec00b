"""What the check that all ranks mean the same exchange adds to it, over gloo with one thread a rank.

Two exchanges of the same vector in one process group, in random turns: the layer's own, and the same without what
the check needs: no number in front, messages as long as their receiver expects, nothing compared, nobody asked which
backend it is. Both send to all ranks at once and add up in the order of ranks. A ratio is of one round's time, mean
over ranks. Beside it stands what the check adds to the caller's own processor time, which waiting does not blur.
"""

import argparse
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from benchmarks.record import record, spread
from syncbn.agreement import Exchange
from syncbn.exchange import peers, sum_over_ranks
from tests.ranks import run_ranks

WORLD_SIZES = (2, 3, 4)
NUM_CHANNELS = 64
NUM_ROUNDS = 60
NUM_PER_ROUND = 40
NUM_WARMUP = 2

_LIMIT_S = 300.0
_EXCHANGE = Exchange("forward", "stage1.0.bn1", NUM_CHANNELS, torch.float32)


def main() -> None:
    """Ranks up to twice the cores of a small machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    rounds = parser.parse_args().rounds
    figures = {
        f"{world_size}_ranks": _figures(run_ranks(world_size, _rank, rounds, timeout_s=_LIMIT_S))
        for world_size in WORLD_SIZES
    }
    record(
        "layer_exchange",
        figures,
        doubles=2 * NUM_CHANNELS + 1,
        rounds=rounds,
        exchanges_per_round=NUM_PER_ROUND,
        threads_per_rank=1,
    )


def _checked(vector: Tensor, group: ProcessGroup) -> Tensor:
    return sum_over_ranks(vector, group, _EXCHANGE)


def _unchecked(vector: Tensor, group: ProcessGroup) -> Tensor:
    num_peers = group.size() - 1
    sizes = [vector.numel()] * num_peers
    sizes.insert(group.rank(), 0)
    received = vector.new_empty(num_peers, vector.numel())
    copies = torch.cat([vector] * num_peers)
    work = group.alltoall_base(received.view(-1), copies, sizes, sizes)
    rows = list(received.unbind())
    rows.insert(group.rank(), vector)
    work.wait()
    total = rows[0] + rows[1]
    for row in rows[2:]:
        total += row
    return total


_VARIANTS: Mapping[str, Callable[[Tensor, ProcessGroup], Tensor]] = {"checked": _checked, "unchecked": _unchecked}


@dataclass
class _Rounds:
    """Seconds of each round of one variant on one rank."""

    elapsed_s: list[float] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)


def _rank(num_rounds: int) -> dict[str, _Rounds]:
    group = peers(None)
    assert group is not None
    vector = torch.randn(2 * NUM_CHANNELS + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(_checked(vector, group), _unchecked(vector, group))
    order = random.Random(0)
    measured = {name: _Rounds() for name in _VARIANTS}
    for number in range(NUM_WARMUP + num_rounds):
        turns = list(_VARIANTS) * NUM_PER_ROUND
        order.shuffle(turns)  # alike on all ranks
        rounds = _round(turns, vector, group)
        if number >= NUM_WARMUP:
            for name, (elapsed_s, processor_s) in rounds.items():
                measured[name].elapsed_s.append(elapsed_s)
                measured[name].processor_s.append(processor_s)
    return measured


def _round(turns: Sequence[str], vector: Tensor, group: ProcessGroup) -> dict[str, tuple[float, float]]:
    """By variant how long its turns took, and how much of the calling thread's processor time; seconds."""
    sums = dict.fromkeys(_VARIANTS, (0.0, 0.0))
    for name in turns:
        before, processor_before = time.perf_counter(), time.thread_time()
        _VARIANTS[name](vector, group)
        elapsed_s, processor_s = time.perf_counter() - before, time.thread_time() - processor_before
        sums[name] = (sums[name][0] + elapsed_s, sums[name][1] + processor_s)
    return sums


def _figures(ranks: Sequence[Mapping[str, _Rounds]]) -> dict[str, object]:
    elapsed = {name: _over_ranks([rank[name].elapsed_s for rank in ranks]) for name in _VARIANTS}
    processor = {name: _over_ranks([rank[name].processor_s for rank in ranks]) for name in _VARIANTS}
    return {
        "checked_over_unchecked": spread(_ratios(elapsed)),
        "added_processor_us": spread([a - b for a, b in zip(*processor.values(), strict=True)]),
        "exchange_us": {name: spread(values) for name, values in elapsed.items()},
    }


def _over_ranks(seconds: Sequence[Sequence[float]]) -> list[float]:
    """Microseconds of one exchange, mean over ranks, by round."""
    return [1e6 * sum(round_) / len(round_) / NUM_PER_ROUND for round_ in zip(*seconds, strict=True)]


def _ratios(times: Mapping[str, Sequence[float]]) -> list[float]:
    return [a / b for a, b in zip(times["checked"], times["unchecked"], strict=True)]


if __name__ == "__main__":
    main()
