"""All ranks of an attempt on the cluster: reserved, started, followed and ended together."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from service.cluster.failures import Cause, RankFailure, judge, no_heartbeat
from service.cluster.outbox import Record
from service.cluster.rank_actor import Drained, RankActor
from service.jobs import AttemptEnded, LaunchRequest, Outcome, Reason, WorkerResources
from service.training.orders import Orders

_POLL_S = 0.25
_DRAIN_WAIT_S = 0.2
_ROOT_CAUSE_GRACE_S = 2.0
_SALVAGE_S = 1.0
_SILENT_S = 3.0


class AttemptOver(Exception):
    """The attempt cannot go on; ``ended`` tells why."""

    def __init__(self, ended: AttemptEnded) -> None:
        self.ended = ended
        super().__init__(ended.detail)


class RankGroup:
    """The ranks of one attempt. Every method but `end` may raise `AttemptOver`.

    ``check`` is called several times a second in every wait, and may raise to leave it. ``orders`` is what is wanted
    of the ranks just now: those that train are told within a second, and before that a stop ends the attempt.
    """

    def __init__(self, request: LaunchRequest, check: Callable[[], None], orders: Callable[[], Orders]) -> None:
        self._request = request
        self._spec = request.spec
        self._check = check
        self._orders = orders
        self._reservation: Any = None
        self._actors: list[Any] = []
        self._places: list[str] = [f"rank {rank}" for rank in range(self._spec.num_workers)]

    def reserve(self) -> None:
        """Take room for all ranks at once, on as few nodes as possible."""
        bundles = [_bundle(self._spec.resources)] * self._spec.num_workers
        self._reservation = placement_group(bundles, strategy="PACK")
        deadline = time.monotonic() + self._spec.timeouts.placement_s
        while not self._reservation.wait(_POLL_S):
            self._check_before_training()
            if time.monotonic() > deadline:
                raise AttemptOver(_placement_timeout(self._request))

    def start(self) -> None:
        """Start one process per rank, wait until all are up, and let them begin to train."""
        resources = self._spec.resources
        request_json = self._request.model_dump_json()
        for rank in range(self._spec.num_workers):
            actor = ray.remote(RankActor).options(
                num_cpus=resources.cpus,
                num_gpus=resources.gpus,
                memory=_bytes(resources.memory_gib) or None,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._reservation, placement_group_bundle_index=rank
                ),
            )
            self._actors.append(actor.remote(request_json, rank))
        deadline = time.monotonic() + self._spec.timeouts.rendezvous_s
        self._places = self._answers([each.place.remote() for each in self._actors], deadline)
        (store_address,) = self._answers([self._actors[0].open_store.remote()], deadline)
        self._answers([each.begin.remote(store_address) for each in self._actors], deadline)

    def follow(self, put: Callable[[int, Sequence[Record]], None]) -> int | None:
        """Hand on all that the ranks tell until every one has ended well.

        Where they have left as they were told, the step that they have saved; None where they have come to the end.
        """
        pending = {self._drain(rank): rank for rank in range(self._spec.num_workers)}
        seen = dict.fromkeys(pending.values(), time.monotonic())
        failures: list[RankFailure] = []
        stopped_step: int | None = None
        patience_ends = float("inf")
        while pending:
            self._check()
            ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_POLL_S)
            now = time.monotonic()
            for answer in ready:
                rank = pending.pop(answer)
                seen[rank] = now
                drained = self._collect(answer, rank, put, failures)
                stopped_step = drained.stopped_step if drained.over else stopped_step
                if not drained.over:
                    pending[self._drain(rank)] = rank
            if failures:
                patience_ends = min(patience_ends, now + _ROOT_CAUSE_GRACE_S)
                if any(each.cause.is_root for each in failures) or now > patience_ends or not pending:
                    break
            late = [rank for rank in pending.values() if now - seen[rank] > self._spec.timeouts.heartbeat_s]
            if late:
                raise AttemptOver(
                    no_heartbeat([self._places[rank] for rank in late], now - min(seen[rank] for rank in late))
                )
        if failures:
            silent = [self._places[rank] for rank in pending.values() if now - seen[rank] > _SILENT_S]
            self._salvage(pending, put, failures)
            raise AttemptOver(judge(failures, silent))
        return stopped_step

    def end(self) -> None:
        """Kill what still runs, a frozen rank too, and give the room back."""
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        if self._reservation is not None:
            remove_placement_group(self._reservation)

    def _drain(self, rank: int) -> Any:
        return self._actors[rank].drain.remote(_DRAIN_WAIT_S, self._orders())

    def _collect(
        self, answer: Any, rank: int, put: Callable[[int, Sequence[Record]], None], failures: list[RankFailure]
    ) -> Drained:
        try:
            drained: Drained = ray.get(answer)
        except RayError as error:
            drained = Drained([], True, RankFailure(rank, self._places[rank], Cause.LOST, _short(error)))
        put(rank, drained.records)
        if drained.failure:
            failures.append(drained.failure)
        return drained

    def _salvage(
        self, pending: dict[Any, int], put: Callable[[int, Sequence[Record]], None], failures: list[RankFailure]
    ) -> None:
        """What the surviving ranks had still to tell when another one's end was seen."""
        ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_SALVAGE_S) if pending else ([], [])
        for answer in ready:
            self._collect(answer, pending[answer], put, failures)

    def _check_before_training(self) -> None:
        self._check()
        if self._orders().stop:
            detail = "told to stop before any rank had begun; there was nothing new to save"
            raise AttemptOver(AttemptEnded(outcome=Outcome.STOPPED, detail=detail))

    def _answers(self, answers: list[Any], deadline: float) -> list[Any]:
        """The values of all, or the end of the attempt."""
        waiting = answers
        while waiting:
            self._check_before_training()
            _, waiting = ray.wait(answers, num_returns=len(answers), timeout=_POLL_S)
            if waiting and time.monotonic() > deadline:
                late = [self._places[answers.index(each)] for each in waiting]
                raise AttemptOver(no_heartbeat(late, self._spec.timeouts.rendezvous_s))
        values = []
        for rank, answer in enumerate(answers):
            try:
                values.append(ray.get(answer))
            except RayError as error:
                raise AttemptOver(judge([RankFailure(rank, self._places[rank], Cause.LOST, _short(error))])) from error
        return values


def _bundle(resources: WorkerResources) -> dict[str, float]:
    amounts = {"CPU": resources.cpus, "GPU": float(resources.gpus), "memory": float(_bytes(resources.memory_gib))}
    return {name: amount for name, amount in amounts.items() if amount}


def _bytes(gib: float | None) -> int:
    return int((gib or 0) * 2**30)


def _placement_timeout(request: LaunchRequest) -> AttemptEnded:
    spec = request.spec
    return AttemptEnded(
        outcome=Outcome.FAILED,
        reason=Reason.PLACEMENT_TIMEOUT,
        detail=(
            f"the cluster had no room for {spec.num_workers} workers of {_bundle(spec.resources)} within "
            f"{spec.timeouts.placement_s:g} s (timeouts.placement_s); is it busy, or has it lost a node?"
        ),
    )


def _short(error: RayError) -> str:
    """The line of Ray's many that tells something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:400] if lines else type(error).__name__
