"""The driver of an attempt, run by Ray on its head node: ``python -m service.cluster.runner``.

Reads the LaunchRequest from ``SYNCBN_RUN`` and the attempt's token from ``SYNCBN_INGEST_TOKEN``. Exit status:
0 succeeded, 1 failed, 3 stopped, 4 ended but could not tell the service, 70 orphaned.
"""

import logging
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import ray

from service.cluster.ingest_sender import IngestSender
from service.cluster.rank_group import AttemptOver, RankGroup
from service.jobs import AttemptEnded, Control, LaunchRequest, Outcome, Phase, PhaseChanged, Reason
from service.training.orders import Orders

_DELIVERY_S = 600.0
_SAVING_S = 5.0
_HURRIED_DELIVERY_S = 3.0  # with the seconds for saving less than the launcher gives before Ray kills
_ORPHAN_EXIT_S = 20.0
_EXIT_STATUS = {Outcome.SUCCEEDED: 0, Outcome.FAILED: 1, Outcome.STOPPED: 3}


def main() -> int:
    """Run the attempt to its end and tell the service how it ended."""
    request = LaunchRequest.model_validate_json(os.environ["SYNCBN_RUN"])
    sender = IngestSender(
        str(request.ingest_url),
        request.attempt_id,
        os.environ["SYNCBN_INGEST_TOKEN"],
        Path(request.storage) / "attempts" / str(request.attempt),
    )
    interruption = Interruption(sender)
    interruption.listen()
    sender.start()
    ray.init(log_to_driver=True, logging_level=logging.WARNING, namespace=request.attempt_id)
    interruption.listen()  # again: Ray has put a handler of its own in place
    ended = run_attempt(request, sender, interruption)
    print(ended.model_dump_json(), flush=True)  # noqa: T201  # the driver's log is read when nothing else came through
    delivered = sender.close(ended, _DELIVERY_S)
    return _EXIT_STATUS[ended.outcome] if delivered else 4


def run_attempt(request: LaunchRequest, sender: IngestSender, interruption: "Interruption") -> AttemptEnded:
    """Place, start and follow the ranks; how that ended. No rank is left when this returns."""
    ranks = RankGroup(request, interruption.check, interruption.orders)
    try:
        sender.tell(PhaseChanged(phase=Phase.PLACING))
        ranks.reserve()
        sender.tell(PhaseChanged(phase=Phase.RENDEZVOUS))
        ranks.start()
        stopped_step = ranks.follow(sender.put)
        if stopped_step is None:
            return AttemptEnded(outcome=Outcome.SUCCEEDED)
        detail = f"{interruption.words}; saved a checkpoint at step {stopped_step}"
        return AttemptEnded(outcome=Outcome.STOPPED, detail=detail, checkpoint_step=stopped_step)
    except AttemptOver as over:
        return over.ended
    except Exception as error:
        # Ray or the disk failed the runner itself: one more way to lose a runner, better told than guessed.
        traceback.print_exc()
        return AttemptEnded(outcome=Outcome.FAILED, reason=Reason.RUNNER_LOST, detail=f"the runner failed: {error}")
    finally:
        ranks.end()


class Interruption:
    """What may end an attempt from outside: the service's word, Ray's signal, or the loss of Ray itself.

    The service's STOP and Ray's signal leave the ranks time to save: STOP as long as the service has patience, Ray's
    signal a few seconds. The service's ABORT leaves none.
    """

    def __init__(self, sender: IngestSender) -> None:
        self._sender = sender
        self._signal: int | None = None
        self._saving_ends = float("inf")
        self._supervisor = os.getppid()
        threading.Thread(target=self._guard, name="orphan guard", daemon=True).start()

    def listen(self) -> None:
        """Take SIGTERM and SIGINT, by which Ray stops a job."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda number, _frame: self._interrupt(number))

    def orders(self) -> Orders:
        """What the ranks shall do about it."""
        stop = self._signal is not None or self._sender.control is Control.STOP
        return Orders(stop=stop, checkpoint_requests=self._sender.checkpoint_requests)

    @property
    def words(self) -> str:
        """Who stopped the attempt."""
        return f"stopped by Ray with {signal.Signals(self._signal).name}" if self._signal else "stopped by the service"

    def check(self) -> None:
        """Raises: AttemptOver once the ranks must be left as they are."""
        if self._orphaned:
            raise AttemptOver(
                AttemptEnded(outcome=Outcome.FAILED, reason=Reason.RUNNER_LOST, detail="Ray on the head node is gone")
            )
        if self._sender.control is Control.ABORT:
            raise AttemptOver(AttemptEnded(outcome=Outcome.STOPPED, detail="stopped by the service"))
        if time.monotonic() > self._saving_ends:
            detail = f"{self.words}; the ranks had not saved within {_SAVING_S:g} s"
            raise AttemptOver(AttemptEnded(outcome=Outcome.STOPPED, detail=detail))

    @property
    def _orphaned(self) -> bool:
        return os.getppid() != self._supervisor

    def _interrupt(self, signum: int) -> None:
        self._signal = signum
        self._saving_ends = min(self._saving_ends, time.monotonic() + _SAVING_S)
        self._sender.hurry(_SAVING_S + _HURRIED_DELIVERY_S)

    def _guard(self) -> None:
        """Leave without Ray: its calls may hang for ever once the processes behind them are gone."""
        while not self._orphaned:
            time.sleep(0.5)
        self._sender.hurry(_HURRIED_DELIVERY_S)
        time.sleep(_ORPHAN_EXIT_S)
        os._exit(70)


if __name__ == "__main__":
    sys.exit(main())
