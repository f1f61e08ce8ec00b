"""The ranks that tests run on: they meet, they answer in order, and a failure is told with its rank."""

import os
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankFailed, run_ranks


def _sum_of_ranks(offset: int) -> torch.Tensor:
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return total


def _rank_and_pid() -> tuple[int, int]:
    return dist.get_rank(), os.getpid()


def _second_rank_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("no such luck")
    dist.barrier()


def _second_rank_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def _second_rank_sleeps() -> None:
    if dist.get_rank() == 1:
        time.sleep(30)


def test_ranks_exchange_and_answer_in_order() -> None:
    assert run_ranks(3, _sum_of_ranks, 1) == [torch.tensor(6.0)] * 3
    assert [rank for rank, _ in run_ranks(3, _rank_and_pid)] == [0, 1, 2]


def test_no_rank_outlives_its_run() -> None:
    pids = [pid for _, pid in run_ranks(2, _rank_and_pid)]
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_the_rank_that_raised_is_named_with_its_traceback() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1.*ValueError: no such luck") as failure:
        run_ranks(3, _second_rank_raises)
    assert failure.value.rank == 1


def test_a_rank_that_dies_is_named_with_its_exit_code() -> None:
    with pytest.raises(RankFailed, match="rank 1: died without a word, exit code 7"):
        run_ranks(3, _second_rank_dies)


def test_a_rank_that_hangs_is_named_at_the_deadline() -> None:
    with pytest.raises(RankFailed, match="still running: 1"):
        run_ranks(2, _second_rank_sleeps, timeout_s=3.0)
