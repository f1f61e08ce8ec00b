"""The runs: what is planted in each, by its number in the plan of the validation, and in which job."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from benchmarks.planted_faults.data_sets import Digits, few_images, other_validation, shard, with_wrong_labels
from benchmarks.planted_faults.examinations import Findings, uneven_ranks
from benchmarks.planted_faults.plants import PLANTS, Plant
from service.jobs import JobSpec
from service.training.context import RankContext

NUM_CHANNELS = 64
DEAD = tuple(range(0, NUM_CHANNELS, 3))[:19]  # 30 % of 64, rounded down
_SHARDS = ((0, 1, 2), (3, 4, 5), (6, 7), (8, 9))


class Severity(StrEnum):
    """Whether a scenario is a promise."""

    OBVIOUS = "obvious"
    """To be found as often as the target says."""
    BORDERLINE = "borderline"
    """It is told how often it is found, no more."""
    HEALTHY = "healthy"
    """Nothing is to be found."""


@dataclass(frozen=True)
class Scenario:
    """A job with a fault or without.

    ``changes`` are fields of the spec; ``plants`` gives names and arguments of plants for a seed, ``data`` the data
    set of a seed and rank. ``target`` is the share of runs in which the fault is to be found with its right cause, or,
    of healthy runs, in which anything may be. ``examines`` looks at what the run left, on every rank. ``timeout_s``
    limits each exchange.
    """

    key: str
    number: int
    severity: Severity
    says: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    plants: Callable[[int], list[tuple[str, dict[str, Any]]]] = lambda _: []
    data: Callable[[int, int], Digits] | None = None
    examines: Callable[[JobSpec, RankContext], Findings] | None = None
    target: float | None = None
    timeout_s: float = 60.0
    seeds: Callable[[int], bool] = lambda _: True
    """Which it is run with."""

    def spec(self, seed: int) -> JobSpec:
        """The job."""
        fields: dict[str, Any] = {
            "name": f"planted {self.key} {seed}",
            "num_workers": 4,
            "batch_size_per_worker": 8,
            "max_steps": 100,
            "optimizer": {"name": "sgd", "learning_rate": 0.05},
            "cadence": {"evaluate_every_steps": 50, "drift_every_steps": 50, "checkpoint_every_steps": 100_000},
            "diagnostics": {"sample_every_steps": 5},
            "seed": seed,
        }
        return JobSpec.model_validate(fields | dict(self.changes))

    def planted(self, seed: int) -> list[Plant]:
        """The plants, none of them active yet; to be entered on every rank."""
        return [PLANTS[name](**arguments) for name, arguments in self.plants(seed)]


def trial_of(name: str) -> tuple[Scenario, int] | None:
    """Scenario and seed of a job that `Scenario.spec` has named; None for any other job."""
    found = re.fullmatch(r"planted (.+) (\d+)", name)
    scenario = SCENARIOS.get(found[1]) if found else None
    return (scenario, int(found[2])) if found and scenario else None


def rank_at_fault(seed: int) -> int:
    """Of four, another one with each seed."""
    return seed % 4


def layer_at_fault(seed: int) -> int:
    """Of three, from 1."""
    return 1 + seed % 3


def channel_at_fault(seed: int) -> int:
    """Of 64."""
    return (7 * seed + 3) % NUM_CHANNELS


def _is_even(seed: int) -> bool:
    return seed % 2 == 0


def _is_odd(seed: int) -> bool:
    return seed % 2 == 1


_LONGER: dict[str, Any] = {"max_steps": 200, "diagnostics": {"sample_every_steps": 10}}


def _alone(batch: int, **changes: Any) -> dict[str, Any]:
    return {"num_workers": 1, "batch_size_per_worker": batch, **_LONGER, **changes}


def _sgd(rate: float, momentum: float = 0.9) -> dict[str, Any]:
    return {"optimizer": {"name": "sgd", "learning_rate": rate, "momentum": momentum}}


def _on_rank(name: str, **arguments: Any) -> Callable[[int], list[tuple[str, dict[str, Any]]]]:
    return lambda seed: [(name, {"rank": rank_at_fault(seed), **arguments})]


def _everywhere(name: str, **arguments: Any) -> Callable[[int], list[tuple[str, dict[str, Any]]]]:
    return lambda _: [(name, arguments)]


# At a rate that stays high the weights never rest, and running statistics truly trail them.
_AT_REST: dict[str, Any] = {"schedule": {"name": "cosine"}}
_SMALL_RESNET: dict[str, Any] = {
    **_LONGER,
    **_AT_REST,
    "model": {"name": "resnet20", "width": 4},
    "max_steps": 100,
}
# Of one seed, four synchronized ranks train as one does, but for rounding: to count both would be to count one twice.
_HEALTHY: dict[str, tuple[Callable[[int], bool], dict[str, Any]]] = {
    "mlp 1 rank": (_is_even, _alone(32, **_AT_REST)),
    "mlp 4 ranks": (_is_odd, _LONGER | _AT_REST),
    "resnet20 1 rank": (_is_even, _alone(32, **_SMALL_RESNET)),
    "resnet20 4 ranks": (_is_odd, _SMALL_RESNET),
}

_OBVIOUS, _BORDERLINE = Severity.OBVIOUS, Severity.BORDERLINE

ALL_HEALTHY = Scenario("0", 0, Severity.HEALTHY, "nothing is wrong, all four settings", target=0.05)
"""Runs of all healthy settings together; it has no job of its own."""

SCENARIOS: dict[str, Scenario] = {
    scenario.key: scenario
    for scenario in [
        *(
            Scenario(f"0 {setting}", 0, Severity.HEALTHY, "nothing is wrong", changes, target=0.05, seeds=seeds)
            for setting, (seeds, changes) in _HEALTHY.items()
        ),
        Scenario(
            "1",
            1,
            _OBVIOUS,
            "momentum 0.001 for 500 steps",
            _alone(32, bn_momentum=0.001, max_steps=500),
            target=0.98,
        ),
        Scenario("1b", 1, _BORDERLINE, "momentum 0.01 for 200 steps", _alone(32, bn_momentum=0.01)),
        Scenario(
            "2",
            2,
            _OBVIOUS,
            "momentum 0.9, batch 4, learning rate 0.1",
            _alone(4, bn_momentum=0.9, max_steps=300, **_sgd(0.1)),
            target=0.9,
        ),
        Scenario(
            "2b", 2, _BORDERLINE, "momentum 0.5, batch 8, learning rate 0.1", _alone(8, bn_momentum=0.5, **_sgd(0.1))
        ),
        Scenario(
            "3",
            3,
            _OBVIOUS,
            "one rank was not converted, the others synchronize",
            {"max_steps": 20},
            _on_rank("UnconvertedModel"),
            target=0.98,
            timeout_s=4.0,
        ),
        Scenario(
            "3 groups",
            3,
            _OBVIOUS,
            "one rank synchronizes with nobody, in a group of its own",
            {},
            lambda seed: [("GroupOfItsOwn", {"alone": rank_at_fault(seed)})],
            target=0.98,
        ),
        Scenario(
            "4",
            4,
            _OBVIOUS,
            "local normalization, each rank has its own classes",
            {"normalization": "local"},
            data=lambda seed, rank: shard(_SHARDS[rank], 1.0, seed),
            target=0.95,
        ),
        Scenario("4 iid", 4, Severity.HEALTHY, "local normalization, equal data", {"normalization": "local"}),
        Scenario(
            "5",
            5,
            _OBVIOUS,
            "each rank has its own classes",
            data=lambda seed, rank: shard(_SHARDS[rank], 1.0, seed),
            target=0.98,
        ),
        Scenario(
            "6",
            6,
            _BORDERLINE,
            "a quarter of one rank's images are of five classes alone",
            data=lambda seed, rank: shard((0, 1, 2, 3, 4), 0.25 * (rank == rank_at_fault(seed)), seed),
        ),
        Scenario(
            "7",
            7,
            _OBVIOUS,
            "one rank does not normalize its images",
            {},
            _on_rank("OtherPixels", scale=6.0, offset=4.9),
            target=1.0,
        ),
        Scenario(
            "7b", 7, _BORDERLINE, "one rank's images are brighter by 0.1", {}, _on_rank("OtherPixels", offset=0.1)
        ),
        Scenario("8", 8, _OBVIOUS, "a batch of one rank is one image", {}, _on_rank("OneImage"), target=0.98),
        Scenario(
            "8b",
            8,
            _BORDERLINE,
            "one rank has 64 images, over and over",
            data=lambda seed, rank: (
                few_images(64, seed) if rank == rank_at_fault(seed) else shard(tuple(range(10)), 0.0, seed)
            ),
        ),
        Scenario(
            "9",
            9,
            _OBVIOUS,
            "one layer stays in training mode",
            {},
            lambda seed: [("StaysInTraining", {"layer": f"norm{layer_at_fault(seed)}"})],
            target=1.0,
        ),
        Scenario("10", 10, _OBVIOUS, "training in evaluation mode", {}, _everywhere("StaysInEvaluation"), target=1.0),
        Scenario(
            "10b",
            10,
            _OBVIOUS,
            "one layer trains in evaluation mode",
            {},
            lambda seed: [("StaysInEvaluation", {"layer": f"norm{layer_at_fault(seed)}"})],
            target=1.0,
        ),
        *(
            Scenario(
                f"11 {change}",
                11,
                severity,
                f"validation images are {says}",
                _alone(32),
                data=lambda seed, _, change=change: other_validation(change, seed),  # type: ignore[misc]
                target=target,
            )
            for change, says, severity, target in (
                ("inverted", "inverted", _OBVIOUS, 0.95),
                ("noise", "noisy", _OBVIOUS, 0.95),
                ("faint noise", "noisy, by half as much", _BORDERLINE, None),
                ("dim", "dimmer, 0.8 of their ink", _BORDERLINE, None),
                ("shifted", "one pixel further right and down", _BORDERLINE, None),
            )
        ),
        *(
            Scenario(
                f"12 x{factor:g}",
                12,
                severity,
                f"the weights of a channel are {factor:g} times as large, from step 101 on",
                _alone(32),
                lambda seed, factor=factor: [  # type: ignore[misc]
                    (
                        "ScaledRow",
                        {
                            "layer": f"linear{layer_at_fault(seed)}",
                            "channel": channel_at_fault(seed),
                            "factor": factor,
                            "at": 101,
                        },
                    )
                ],
                target=target,
            )
            for factor, severity, target in ((1e4, _OBVIOUS, 0.95), (1e3, _BORDERLINE, None))
        ),
        Scenario(
            "13",
            13,
            _OBVIOUS,
            "learning rate 30 without normalization",
            _alone(32, **_sgd(30.0)),
            _everywhere("NoNormalization"),
            target=1.0,
        ),
        Scenario(
            "14",
            14,
            _BORDERLINE,
            "learning rate 0.3 with normalization",
            _alone(32, **_sgd(0.3)),
        ),
        Scenario(
            "15",
            15,
            _OBVIOUS,
            "19 of 64 channels are dead, from step 61 on",
            {},
            lambda seed: [("LowBias", {"layer": f"norm{layer_at_fault(seed)}", "channels": DEAD, "at": 61})],
            target=1.0,
        ),
        Scenario(
            "16",
            16,
            _OBVIOUS,
            "the weights of a channel are 0",
            {},
            lambda seed: [
                ("ZeroRow", {"layer": f"linear{layer_at_fault(seed)}", "channel": channel_at_fault(seed), "at": 31})
            ],
            target=1.0,
        ),
        Scenario(
            "17",
            17,
            _OBVIOUS,
            "an image of one rank is no number",
            {"max_steps": 100},
            _on_rank("NanImage", at=73),
            target=1.0,
        ),
        Scenario(
            "18",
            18,
            _OBVIOUS,
            "local normalization of two images",
            {"normalization": "local", "batch_size_per_worker": 2},
            target=1.0,
        ),
        Scenario(
            "19",
            19,
            Severity.HEALTHY,
            "ranks with 8, 8, 8 and 1 images",
            {"max_steps": 1},
            examines=uneven_ranks,
            target=0.0,
        ),
        Scenario(
            "20",
            20,
            _OBVIOUS,
            "running statistics of step 5 beside weights of step 200",
            _alone(32),
            _everywhere("OldStatistics", of=5, at=200),
            target=0.98,
        ),
        Scenario(
            "21",
            21,
            _OBVIOUS,
            "40 % of labels are drawn anew, 40 epochs",
            _alone(
                32,
                model={"name": "mlp", "hidden_sizes": [128, 128]},
                max_steps=1800,
                cadence={"evaluate_every_steps": 180, "drift_every_steps": 180, "checkpoint_every_steps": 100_000},
                diagnostics={"sample_every_steps": 60},
                **_sgd(0.1),
                **_AT_REST,
            ),
            data=lambda seed, _: with_wrong_labels(0.4, seed),
            target=0.9,
        ),
        Scenario(
            "22",
            22,
            Severity.HEALTHY,
            "a plateau under AR(1) noise of correlation 0.9",
            _alone(32, max_steps=600, cadence={"checkpoint_every_steps": 100_000, "evaluate_every_steps": 150}),
            lambda seed: [("RestlessLoss", {"at": 101, "seed": seed})],
            data=lambda seed, _: with_wrong_labels(0.4, seed),
            target=0.05,
        ),
    ]
}
