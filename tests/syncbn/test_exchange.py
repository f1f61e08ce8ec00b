"""Sums and gathers over real ranks: exact, the same bits everywhere, one collective."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.exchange import gather_over_ranks, peers, sum_over_ranks
from tests.ranks import run_ranks
from tests.syncbn.collectives import Collective, CollectiveLog

SMALL, LARGE = 129, 100_000  # 100,000 doubles for two ranks are beyond a megabyte


def _vector(rank: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def _sum(size: int) -> tuple[Tensor, list[Collective]]:
    with CollectiveLog() as log:
        total = sum_over_ranks(_vector(dist.get_rank(), size), peers(None))
    return total, log.collectives


def _gather(size: int) -> tuple[Tensor, list[Collective]]:
    with CollectiveLog() as log:
        rows = gather_over_ranks(_vector(dist.get_rank(), size), peers(None))
    return rows, log.collectives


def _headers_then(operator: str, size: int) -> list[Collective]:
    return [Collective("alltoall_base_", 0, "float64"), Collective(operator, size, "float64")]


@pytest.mark.parametrize(
    ("world_size", "size", "expected_collectives"),
    [
        (2, SMALL, [Collective("alltoall_base_", SMALL, "float64")]),
        (4, SMALL, [Collective("alltoall_base_", SMALL, "float64")]),
        (2, LARGE, _headers_then("allreduce_", LARGE)),
        (9, 5, _headers_then("allreduce_", 5)),
    ],
)
def test_every_rank_has_the_same_sum_after_one_collective_or_two_if_large(
    world_size: int, size: int, expected_collectives: list[Collective]
) -> None:
    results = run_ranks(world_size, _sum, size)
    expected = torch.stack([_vector(rank, size) for rank in range(world_size)]).sum(0)
    for total, collectives in results:
        torch.testing.assert_close(total, expected, rtol=1e-13, atol=1e-13)
        assert torch.equal(total, results[0][0])
        assert collectives == expected_collectives


@pytest.mark.parametrize(
    ("size", "operators"), [(SMALL, ["alltoall_base_"]), (LARGE, ["alltoall_base_", "allgather_"])]
)
def test_every_rank_gathers_all_vectors_bit_for_bit(size: int, operators: list[str]) -> None:
    expected = torch.stack([_vector(rank, size) for rank in range(2)])
    for rows, collectives in run_ranks(2, _gather, size):
        assert torch.equal(rows, expected)
        assert [collective.operator for collective in collectives] == operators


def test_a_process_alone_has_no_peers_and_keeps_its_vector() -> None:
    vector = _vector(0, 3)
    assert peers(None) is None
    assert sum_over_ranks(vector, None) is vector
    assert torch.equal(gather_over_ranks(vector, None), vector.unsqueeze(0))
    assert run_ranks(1, _has_peers) == [False]


def _has_peers() -> bool:
    return peers(None) is not None
