"""The Ray actor around one rank. Light to import: torch is imported where the rank runs, not in the runner too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from service.cluster.failures import RankFailure
from service.cluster.outbox import Record
from service.jobs import LaunchRequest
from service.training.orders import Orders

if TYPE_CHECKING:
    from service.cluster.rank import Rank


@dataclass(frozen=True)
class Drained:
    """What a rank told since the last time, and whether that was all."""

    records: list[Record]
    over: bool
    failure: RankFailure | None
    stopped_step: int | None = None
    """Where the rank has left as it was told, all having been saved."""


class RankActor:
    """Passes the runner's calls on to its `Rank`."""

    def __init__(self, request_json: str, rank: int) -> None:
        from service.cluster.rank import Rank

        request = LaunchRequest.model_validate_json(request_json)
        self._rank: Rank = Rank(request, rank, str(ray.util.get_node_ip_address()))

    def place(self) -> str:
        """Where the rank runs, for people."""
        return self._rank.place()

    def open_store(self) -> tuple[str, int]:
        """Serve the rendezvous store; its address."""
        return self._rank.open_store()

    def begin(self, store_address: tuple[str, int]) -> None:
        """Meet the other ranks and train."""
        self._rank.begin(store_address)

    def drain(self, wait_s: float, orders: Orders) -> Drained:
        """Take in ``orders``; what has happened since the last call, after ``wait_s`` or when it is over."""
        return self._rank.drain(wait_s, orders)
