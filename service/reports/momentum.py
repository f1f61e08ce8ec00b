"""Says whether another momentum would have given better running statistics."""

import math

from service.jobs import MomentumReplay, MomentumVerdict, ReplayedMomentum
from service.reports.margins import STALE_SHIFT

WORTHWHILE = 0.5
"""A momentum is better if it leaves at most this share of the output error: smaller gains change from step to step."""
_SQUARE = "(root mean square)"


def judge_momentum(replay: MomentumReplay | None) -> MomentumVerdict | None:
    """The best replayed momentum against the one in use; better only if it halves the output error of the worst layer.

    Running means that are off by less than 0.05 sd are no reason to change anything. Numbers are judged as they are
    printed, with three digits, so that no sentence can contradict its verdict.
    """
    if replay is None:
        return None
    by_momentum = {candidate.momentum: candidate for candidate in replay.candidates}
    used, best = by_momentum.get(replay.used), by_momentum.get(replay.best)
    if used is None or best is None:
        return _not_better("Undecided: the momenta replayed lack the one in use.", replay)
    if not (math.isfinite(best.rms_mean_shift) and math.isfinite(best.output_error)):
        return _not_better("Undecided: no momentum gives running statistics that are finite.", replay)
    gains, matters = _gains(best, used), _printed(used.rms_mean_shift) >= STALE_SHIFT
    over = f"(replayed over the last {replay.num_steps} steps)"
    if gains and matters:
        sentence = (
            f"bn_momentum {best.momentum:g} would have left the outputs of the worst layer off by "
            f"{best.output_error:.3g} sd {_SQUARE} instead of {used.output_error:.3g} with {used.momentum:g} {over}."
        )
        return MomentumVerdict(sentence=sentence, better=best.momentum, replay=replay)
    if not (math.isfinite(used.output_error) and math.isfinite(used.rms_mean_shift)):
        return _not_better(f"Undecided: bn_momentum {used.momentum:g} gives statistics that are not finite.", replay)
    return _not_better(f"{_well_enough(used, best) if gains else _as_well(used, best)} {over}.", replay)


def _not_better(sentence: str, replay: MomentumReplay) -> MomentumVerdict:
    return MomentumVerdict(sentence=sentence, better=None, replay=replay)


def _gains(best: ReplayedMomentum, used: ReplayedMomentum) -> bool:
    if best is used:
        return False
    if not math.isfinite(used.output_error):
        return True
    return _printed(best.output_error) <= WORTHWHILE * _printed(used.output_error)


def _as_well(used: ReplayedMomentum, best: ReplayedMomentum) -> str:
    off = f"the outputs of the worst layer are off by {used.output_error:.3g} sd {_SQUARE}"
    if used.momentum == best.momentum:
        return f"bn_momentum {used.momentum:g} is the best of those replayed: {off}"
    return (
        f"bn_momentum {used.momentum:g} does about as well as any: {off}, and by {best.output_error:.3g} with "
        f"{best.momentum:g}"
    )


def _well_enough(used: ReplayedMomentum, best: ReplayedMomentum) -> str:
    return (
        f"bn_momentum {used.momentum:g} does well enough: running means are off by {used.rms_mean_shift:.3g} sd in the "
        f"worst layer, and less than {STALE_SHIFT:g} does not matter, although outputs are off by "
        f"{used.output_error:.3g} sd {_SQUARE}, and by {best.output_error:.3g} with {best.momentum:g}"
    )


def _printed(value: float) -> float:
    return float(f"{value:.3g}")
