"""Says whether another momentum would have given better running statistics."""

import math

from service.jobs import MomentumReplay, MomentumVerdict, ReplayedMomentum
from service.reports.margins import STALE_SHIFT

WORTHWHILE = 0.5
"""A momentum is better if it leaves at most this share of the output error: smaller gains change from step to step."""


def judge_momentum(replay: MomentumReplay | None) -> MomentumVerdict | None:
    """The best replayed momentum against the one in use; better only if it halves the output error of the worst layer.

    A shift below 0.05 sd is no reason to change anything.
    """
    if replay is None:
        return None
    by_momentum = {candidate.momentum: candidate for candidate in replay.candidates}
    used, best = by_momentum.get(replay.used), by_momentum.get(replay.best)
    if used is None or best is None:
        return MomentumVerdict(
            sentence="Undecided: the momenta replayed lack the one in use.", better=None, replay=replay
        )
    if not math.isfinite(best.rms_mean_shift):
        return MomentumVerdict(
            sentence="Undecided: no momentum gives running statistics that are finite.", better=None, replay=replay
        )
    is_better = used.rms_mean_shift >= STALE_SHIFT and _is_better(best, used)
    over = f"replayed over the last {replay.num_steps} steps"
    if is_better:
        sentence = (
            f"bn_momentum {best.momentum:g} would have given a shift of {best.rms_mean_shift:.2g} sd in the worst "
            f"layer instead of {used.rms_mean_shift:.2g} with {used.momentum:g} ({over})."
        )
    else:
        sentence = (
            f"bn_momentum {used.momentum:g} does about as well as any: a shift of {used.rms_mean_shift:.2g} sd in the "
            f"worst layer, {best.rms_mean_shift:.2g} with {best.momentum:g} ({over})."
        )
    return MomentumVerdict(sentence=sentence, better=best.momentum if is_better else None, replay=replay)


def _is_better(best: ReplayedMomentum, used: ReplayedMomentum) -> bool:
    if not math.isfinite(used.output_error):
        return math.isfinite(best.output_error)
    return best.output_error <= WORTHWHILE * used.output_error
