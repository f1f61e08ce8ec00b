"""Faults planted in real runs are found with cause, layer and rank; `benchmarks.planted_faults` counts how often."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.planted_faults.data_sets import digits
from benchmarks.planted_faults.examinations import uneven_ranks
from benchmarks.planted_faults.grafting import python_path
from benchmarks.planted_faults.page import page_of
from benchmarks.planted_faults.runs import Answer, Told, run_on_rank, together
from benchmarks.planted_faults.scenarios import SCENARIOS, Scenario, Severity, trial_of
from benchmarks.planted_faults.verdicts import Expected, alarms
from service.cluster import rank as rank_of_a_service
from service.jobs import FindingKind, JobReport, StepMetrics
from service.training.context import RankContext
from service.training.idx import read_idx
from service.training.loop import train
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


_RANK_PROGRAM = """
import sys
from pathlib import Path
import torch
from service.cluster import rank
from service.jobs import JobSpec, StepMetrics
from service.training.context import RankContext

for number, spec in enumerate(map(JobSpec.model_validate_json, sys.argv[2:])):
    context = RankContext(0, 1, torch.device("cpu"), Path(sys.argv[1]) / str(number))
    events = rank.train(spec, context)
    print(next(event.loss for event in events if isinstance(event, StepMetrics)))
    events.close()
"""
"""The first step of what a rank of a service does, of one job after another: no word of plants in it."""


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
    assert uneven.examined["error"] < 1e-6
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


def test_a_service_of_the_benchmark_trains_with_the_plants_that_a_job_is_named_by(tmp_path: Path) -> None:
    explodes, other_images = SCENARIOS["13"].spec(5), SCENARIOS["11 inverted"].spec(5)
    as_ever = explodes.model_copy(update={"name": "planted nothing 5"})
    specs = [spec.model_dump_json() for spec in (explodes, other_images, as_ever)]

    program = subprocess.run(
        [sys.executable, "-P", "-c", _RANK_PROGRAM, tmp_path, *specs],
        env=os.environ | {"PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert program.returncode == 0, program.stderr
    exploding, _, unharmed = map(float, program.stdout.splitlines())
    # In this process, which has another PYTHONPATH, a service's rank is as it was written.
    assert vars(rank_of_a_service)["train"] is train
    context = RankContext(0, 1, torch.device("cpu"), tmp_path / "here")
    loss = next(event.loss for event in train(explodes, context) if isinstance(event, StepMetrics))
    assert unharmed == pytest.approx(loss, rel=1e-5)  # float32, by another number of threads
    assert exploding != pytest.approx(loss, rel=1e-3)
    images = read_idx(tmp_path / "1" / "data of rank 0" / "t10k-images-idx3-ubyte")
    np.testing.assert_array_equal(images, 240 - 15 * digits().validation_images.astype(np.int64))


def test_a_trial_is_known_again_by_the_name_of_its_job() -> None:
    for scenario in SCENARIOS.values():
        assert trial_of(scenario.spec(17).name) == (scenario, 17)
    assert trial_of("planted nothing 17") is None
    assert trial_of("digits") is None


def _page(told: Told) -> JobReport:
    assert not any(told.failures), told.failures
    return page_of(told)


def _says(page: JobReport, expected: Expected) -> bool:
    return expected.is_met(page, failures=())
