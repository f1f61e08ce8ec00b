"""Runs of scenarios: real ranks that train one after the other, and everything that they told.

Ranks stay alive from run to run. Each run has a process group of its own, met through a file, so that one that ends in
an error leaves nothing to the next. What was told lies in a file for each run: work that is interrupted goes on.
"""

import gzip
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]  # public, yet not marked as exported

from benchmarks.planted_faults.examinations import Findings
from benchmarks.planted_faults.scenarios import SCENARIOS, Scenario
from service.jobs import TELEMETRY_EVENT, TelemetryEvent
from service.training import process_group
from service.training.context import RankContext
from service.training.loop import train
from tests.ranks import run_ranks

_CHUNK = 20
_RUN_S = 120.0


@dataclass(frozen=True)
class Told:
    """What the ranks of one run told, with what words each failed (empty: it did not), what rank 0 found after it."""

    scenario: Scenario
    seed: int
    events: tuple[tuple[TelemetryEvent, ...], ...]
    failures: tuple[str, ...]
    examined: Findings


@dataclass(frozen=True)
class Answer:
    """What one rank told; events as JSON."""

    events: list[str]
    failure: str
    examined: Findings


def run(trials: Sequence[tuple[str, int]]) -> Iterator[Told]:
    """The trials, pairs of a scenario's key and a seed, in runs of equal numbers of ranks.

    Raises: tests.ranks.RankFailed if ranks die or hang, which no scenario should make them do.
    """
    by_size: dict[int, list[tuple[str, int]]] = {}
    for key, seed in trials:
        by_size.setdefault(SCENARIOS[key].spec(seed).num_workers, []).append((key, seed))
    for num_ranks, of_size in by_size.items():
        for start in range(0, len(of_size), _CHUNK):
            chunk = of_size[start : start + _CHUNK]
            with tempfile.TemporaryDirectory(prefix="syncbn-planted-") as folder:
                answers = run_ranks(num_ranks, _run_keys, chunk, Path(folder), timeout_s=_RUN_S * len(chunk))
            for (key, seed), of_ranks in zip(chunk, zip(*answers, strict=True), strict=True):
                yield together(SCENARIOS[key], seed, of_ranks)


def together(scenario: Scenario, seed: int, answers: Sequence[Answer]) -> Told:
    """What all ranks told of one run."""
    events = tuple(tuple(map(TELEMETRY_EVENT.validate_json, answer.events)) for answer in answers)
    return Told(scenario, seed, events, tuple(answer.failure for answer in answers), answers[0].examined)


def run_on_rank(trials: Sequence[tuple[Scenario, int]], folder: Path) -> list[Answer]:
    """Take part in runs of scenarios with seeds, one after the other; the group that all came in is left."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # before the group goes that all were to meet in
    dist.destroy_process_group()
    return [
        _run_one(scenario, seed, rank, world_size, folder / str(number))
        for number, (scenario, seed) in enumerate(trials)
    ]


def write(told: Told, folder: Path) -> None:
    """One file, whole or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "events": [[event.model_dump_json() for event in rank] for rank in told.events],
        "failures": told.failures,
        "examined": told.examined,
    }
    path = path_of(folder, told.scenario.key, told.seed)
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(gzip.compress(json.dumps(content).encode(), compresslevel=5))
    unfinished.replace(path)


def read(folder: Path, key: str, seed: int) -> Told:
    """What `write` wrote."""
    content: dict[str, Any] = json.loads(gzip.decompress(path_of(folder, key, seed).read_bytes()))
    events = tuple(tuple(map(TELEMETRY_EVENT.validate_json, rank)) for rank in content["events"])
    return Told(SCENARIOS[key], seed, events, tuple(content["failures"]), content["examined"])


def path_of(folder: Path, key: str, seed: int) -> Path:
    """Where the telling of a run lies."""
    return folder / f"{key.replace(' ', '-')}.{seed}.json.gz"


def _run_keys(trials: Sequence[tuple[str, int]], folder: Path) -> list[Answer]:
    return run_on_rank([(SCENARIOS[key], seed) for key, seed in trials], folder)


def _run_one(scenario: Scenario, seed: int, rank: int, world_size: int, folder: Path) -> Answer:
    folder.mkdir(exist_ok=True)
    spec = scenario.spec(seed)
    if scenario.data:
        uri = scenario.data(seed, rank).write(folder / f"data of rank {rank}")
        spec = spec.model_copy(update={"data": uri})
    context = RankContext(rank, world_size, torch.device("cpu"), folder / "storage")
    store = FileStore(str(folder / "store"), world_size)
    process_group.join(rank, world_size, store, context.device, scenario.timeout_s)
    told: list[str] = []
    failure = ""
    examined: Findings = {}
    try:
        with ExitStack() as stack:
            for plant in scenario.planted(seed):
                stack.enter_context(plant)
            told.extend(event.model_dump_json() for event in train(spec, context))
        if scenario.examines:
            examined = scenario.examines(spec, context)
    except Exception as error:  # a verdict like others: the service tells it as the reason of the failure
        failure = f"{type(error).__name__}: {error}"
    finally:
        process_group.leave()
    return Answer(told, failure, examined)
