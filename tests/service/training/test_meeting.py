"""Ranks hear of an order at different times and follow it together."""

from pathlib import Path

import torch
import torch.distributed as dist

from service.training.context import RankContext
from service.training.meeting import NOTICE_S, Meetings
from service.training.orders import Orders
from tests.ranks import run_ranks


def _meet(step_s: float, first_heard: int) -> tuple[list[int], list[int]]:
    """After which steps this rank asked what is wanted, and after which it was told to stop.

    A step takes ``step_s`` on rank 0, a thousand times as long on rank 1. Rank 0 hears of the stop after step
    ``first_heard``, rank 1 from the beginning.
    """
    rank = dist.get_rank()
    asked, told = [], []
    step = 0

    def orders() -> Orders:
        asked.append(step)
        return Orders(stop=rank == 1 or step >= first_heard, checkpoint_requests=step)

    context = RankContext(rank, 2, torch.device("cpu"), Path("unused"))
    meetings = Meetings(context, orders, last_step=0, clock=lambda: step * step_s * 1000**rank)
    for step in range(1, 31):  # the clock and the orders read it
        answer = meetings.after(step)
        assert answer.checkpoint_requests == (step if step in asked else 0)
        if answer.stop:
            told.append(step)
    return asked, told


def test_all_ranks_follow_what_rank_zero_has_heard_at_the_same_steps() -> None:
    leading, other = run_ranks(2, _meet, NOTICE_S / 4, 10)
    # Distances double at first, whatever the first steps took; then four steps fit in the notice.
    assert leading == other == ([1, 3, 7, 11, 15, 19, 23, 27], [11, 15, 19, 23, 27])


def test_steps_slower_than_the_notice_meet_after_every_one() -> None:
    leading, other = run_ranks(2, _meet, 2 * NOTICE_S, 31)
    assert leading == other == (list(range(1, 31)), [])
