"""What the report of each scenario has to say, by the scenario's key."""

from collections.abc import Callable

from benchmarks.planted_faults.scenarios import DEAD, channel_at_fault, layer_at_fault, rank_at_fault
from benchmarks.planted_faults.verdicts import Expected
from service.jobs import FindingKind as Kind


def _norm(seed: int) -> str:
    return f"norm{layer_at_fault(seed)}"


def _rank_differs(seed: int) -> Expected:
    return Expected((Kind.RANK_DIFFERS, Kind.RANK_REPEATS), rank=rank_at_fault(seed))


def _rank_differs_at_first_layer(seed: int) -> Expected:
    return Expected((Kind.RANK_DIFFERS,), rank=rank_at_fault(seed), layer="norm1")


def _other_data(_: int) -> Expected:
    return Expected((Kind.OTHER_DATA,), layer="norm1")


def _exploding(seed: int) -> Expected:
    return Expected((Kind.EXPLODING_CHANNELS,), layer=_norm(seed), channels=(channel_at_fault(seed),))


def _wrong_mode(seed: int) -> Expected:
    return Expected((Kind.BATCH_IN_EVALUATION, Kind.MOVED_IN_EVALUATION), layer=_norm(seed))


EXPECTED: dict[str, Callable[[int], Expected]] = {
    "1": lambda _: Expected((Kind.STATISTICS_YOUNG,)),
    "1b": lambda _: Expected((Kind.STATISTICS_YOUNG,)),
    "2": lambda _: Expected((Kind.STATISTICS_NOISY,)),
    "2b": lambda _: Expected((Kind.STATISTICS_NOISY,)),
    "3": lambda seed: Expected(failure=rf"rank {rank_at_fault(seed)} (did not come|left no word)"),
    "3 groups": lambda seed: Expected((Kind.BUFFERS_DIFFER,), rank=rank_at_fault(seed)),
    "4": lambda _: Expected((Kind.RANK_DIFFERS,), layer="norm1"),
    "5": lambda _: Expected((Kind.RANK_DIFFERS,)),
    "6": _rank_differs,
    "7": _rank_differs_at_first_layer,
    "7b": _rank_differs_at_first_layer,
    "8": _rank_differs,
    "8b": _rank_differs,
    "9": _wrong_mode,
    "10": lambda _: Expected((Kind.FROZEN_IN_TRAINING,), layer="norm1"),
    "10b": lambda seed: Expected((Kind.FROZEN_IN_TRAINING,), layer=_norm(seed)),
    "11 inverted": _other_data,
    "11 noise": _other_data,
    "11 faint noise": _other_data,
    "11 dim": _other_data,
    "11 shifted": _other_data,
    "12 x10000": _exploding,
    "12 x1000": _exploding,
    "13": lambda _: Expected((Kind.NON_FINITE, Kind.DIVERGED), tensor=True),
    "14": lambda _: Expected((Kind.DAMAGE,)),
    "15": lambda seed: Expected((Kind.DEAD_CHANNELS,), layer=_norm(seed), channels=DEAD),
    "16": lambda seed: Expected((Kind.COLLAPSED_CHANNELS,), layer=_norm(seed), channels=(channel_at_fault(seed),)),
    "17": lambda seed: Expected((Kind.NON_FINITE,), rank=rank_at_fault(seed), step=73),
    "18": lambda _: Expected((Kind.FEW_IMAGES,)),
    "20": lambda _: Expected((Kind.DAMAGE,)),
    "21": lambda _: Expected((Kind.OVERFITTING,)),
}
"""Of a seed. Healthy scenarios have none: there, nothing is to be found that is more than a note."""
