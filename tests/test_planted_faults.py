"""Faults planted in real runs are found with cause, layer and rank; `benchmarks.planted_faults` counts how often."""

from pathlib import Path
from typing import Any

from benchmarks.planted_faults.examinations import uneven_ranks
from benchmarks.planted_faults.page import page_of
from benchmarks.planted_faults.runs import Answer, Told, run_on_rank, together
from benchmarks.planted_faults.scenarios import Scenario, Severity
from benchmarks.planted_faults.verdicts import Expected, alarms
from service.jobs import FindingKind, JobReport
from tests.ranks import run_ranks

_SHORT = {
    "max_steps": 44,
    "schedule": {"name": "cosine"},  # what still moves at the end leaves statistics behind, and that would be told
    "cadence": {"evaluate_every_steps": 100, "drift_every_steps": 100, "checkpoint_every_steps": 100},
    "diagnostics": {"sample_every_steps": 3},
}
_ALONE = {"num_workers": 1, "batch_size_per_worker": 32}


def _scenario(key: str, *plants: tuple[str, dict[str, Any]], **fields: Any) -> Scenario:
    return Scenario(key, 0, Severity.OBVIOUS, key, plants=lambda _: list(plants), **fields)


_FOUR_FAULTS = _scenario(
    "four faults",
    ("OtherPixels", {"rank": 3, "scale": 6.0, "offset": 4.9}),
    ("LowBias", {"layer": "norm2", "channels": (3, 5, 8, 13, 21, 34, 55), "at": 12}),
    ("ZeroRow", {"layer": "linear3", "channel": 11}),
    ("NanImage", {"rank": 1, "at": 44}),
    changes=_SHORT,
)
_FOUR_RANKS = [
    (_FOUR_FAULTS, 0),
    (_scenario("healthy", changes=_SHORT), 0),
    (_scenario("uneven", changes={"max_steps": 1}, examines=uneven_ranks), 0),
]
_ONE_RANK = [
    (_scenario("evaluates by the batch", ("StaysInTraining", {"layer": "norm2"}), changes=_SHORT | _ALONE), 0),
    (_scenario("trains by old statistics", ("StaysInEvaluation", {"layer": "norm3"}), changes=_SHORT | _ALONE), 0),
    (_scenario("momentum", changes=_SHORT | _ALONE | {"bn_momentum": 0.001}), 0),
    (_scenario("healthy", changes=_SHORT | _ALONE), 0),
]


def _on_four_ranks(folder: Path) -> list[Answer]:
    return run_on_rank(_FOUR_RANKS, folder)


def _on_one_rank(folder: Path) -> list[Answer]:
    return run_on_rank(_ONE_RANK, folder)


def test_faults_of_data_weights_and_numbers_are_found_on_their_rank_and_layer(tmp_path: Path) -> None:
    answers = zip(*run_ranks(4, _on_four_ranks, tmp_path, timeout_s=110.0), strict=True)
    faults, healthy, uneven = [together(*trial, ranks) for trial, ranks in zip(_FOUR_RANKS, answers, strict=True)]
    page = _page(faults)

    assert _says(page, Expected((FindingKind.RANK_DIFFERS,), rank=3, layer="norm1"))
    assert not _says(page, Expected((FindingKind.RANK_DIFFERS,), rank=1))
    dead = Expected((FindingKind.DEAD_CHANNELS,), layer="norm2", channels=(3, 5, 8, 13, 21, 34, 55))
    assert _says(page, dead), page.channels
    assert _says(page, Expected((FindingKind.COLLAPSED_CHANNELS,), layer="norm3", channels=(11,))), page.channels
    assert _says(page, Expected((FindingKind.NON_FINITE,), rank=1, step=44, layer="flatten"))

    # In the same processes, after plants that were to leave nothing behind.
    assert alarms(_page(healthy)) == []
    assert float(uneven.examined["error"]) < 1e-6
    assert uneven.examined["alarms"] == 0.0


def test_wrong_modes_and_a_small_momentum_are_told_by_their_names(tmp_path: Path) -> None:
    (answers,) = run_ranks(1, _on_one_rank, tmp_path, timeout_s=110.0)
    runs = [together(*trial, [answer]) for trial, answer in zip(_ONE_RANK, answers, strict=True)]
    evaluates, trains, momentum, healthy = map(_page, runs)

    assert _says(evaluates, Expected((FindingKind.BATCH_IN_EVALUATION,), layer="norm2"))
    assert _says(evaluates, Expected((FindingKind.MOVED_IN_EVALUATION,), layer="norm2"))
    assert _says(trains, Expected((FindingKind.FROZEN_IN_TRAINING,), layer="norm3"))
    assert _says(momentum, Expected((FindingKind.STATISTICS_YOUNG,)))
    assert alarms(healthy) == []


def _page(told: Told) -> JobReport:
    assert not any(told.failures), told.failures
    return page_of(told)


def _says(page: JobReport, expected: Expected) -> bool:
    return expected.is_met(page, failures=(), examined={})
