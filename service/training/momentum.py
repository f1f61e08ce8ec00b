"""What another momentum of the running statistics would have given: told at the end of a run, from its own batches."""

from collections.abc import Mapping

from torch import nn

from service.jobs import MomentumReplay, ReplayedMomentum
from syncbn import BatchMoments
from syncbn.history import StatisticsHistory
from syncbn.replay import MOMENTA, MomentumDrift, best_of, compare_momenta

MOST_UNSEEN = 0.05
"""Momenta with more of their statistics before the steps that were kept are left out: too little is known of them."""


def replay_momenta(
    model: nn.Module, history: StatisticsHistory, population: Mapping[str, BatchMoments], used: float, step: int
) -> MomentumReplay | None:
    """The momenta held against ``population``, ``used`` among them; None where there is nothing to replay.

    No exchange: one rank does it alone, under local normalization rank 0, whose statistics are saved.
    """
    drifts = compare_momenta(model, history, population, sorted({*MOMENTA, used}, reverse=True))
    known = [drift for drift in drifts if drift.momentum == used or drift.unseen_weight <= MOST_UNSEEN]
    if not known or history.num_steps == 0:
        return None
    return MomentumReplay(
        step=step,
        num_steps=history.num_steps,
        used=used,
        best=_momentum(best_of(known)),
        candidates=tuple(
            ReplayedMomentum(
                momentum=_momentum(drift), rms_mean_shift=drift.rms_mean_shift, output_error=drift.output_error
            )
            for drift in known
        ),
    )


def _momentum(drift: MomentumDrift) -> float:
    assert drift.momentum is not None
    return drift.momentum
