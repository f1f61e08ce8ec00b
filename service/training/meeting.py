"""How ranks that hear of an order at different times come to follow it at the same step: rank 0 says."""

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from service.training.context import RankContext
from service.training.orders import Orders

NOTICE_S = 0.5
"""About how long an order may wait for the next meeting."""


class Meetings:
    """The steps after which the ranks meet, and what rank 0 has heard by then.

    Each meeting sets the distance to the next in steps, so that all ranks know it: about ``NOTICE_S`` at the pace since
    the last one, at most twice the last distance (the first steps are slow, and say little of those to come). A rank
    alone meets nobody and follows the same steps.
    """

    def __init__(
        self,
        context: RankContext,
        orders: Callable[[], Orders],
        last_step: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._context = context
        self._orders = orders
        self._clock = clock
        self._last_step = last_step
        self._last_time = clock()
        self._distance = 1

    def after(self, step: int) -> Orders:
        """What is asked of the run after ``step``; nothing between meetings.

        All ranks must call after every step. Cost: one broadcast of three integers from rank 0 at a meeting, nothing
        else.
        """
        if step < self._last_step + self._distance:
            return Orders()
        heard = self._orders()
        words = [int(heard.stop), heard.checkpoint_requests, self._next_distance(step)]
        stop, checkpoint_requests, distance = said_by_rank_zero(words, self._context)
        self._last_step, self._last_time, self._distance = step, self._clock(), distance
        return Orders(stop=bool(stop), checkpoint_requests=checkpoint_requests)

    def _next_distance(self, step: int) -> int:
        elapsed_s = max(self._clock() - self._last_time, 1e-9)
        steps_in_time = int(NOTICE_S * (step - self._last_step) / elapsed_s)
        return max(1, min(steps_in_time, 2 * self._distance))


def said_by_rank_zero(numbers: Sequence[int], context: RankContext) -> list[int]:
    """Rank 0's ``numbers`` on every rank; the others give as many, whatever they are. One broadcast; all must call."""
    if context.world_size == 1:
        return list(numbers)
    said = torch.tensor(numbers, dtype=torch.int64, device=context.device)
    dist.broadcast(said, src=0)
    agreed: list[int] = said.tolist()
    return agreed


def highest_over_ranks(number: int, context: RankContext) -> int:
    """The highest of the ranks' numbers, on every rank. One exchange of one integer; all must call."""
    if context.world_size == 1:
        return number
    highest = torch.tensor([number], dtype=torch.int64, device=context.device)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return int(highest.item())
