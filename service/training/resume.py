"""Agreeing on the checkpoint that a new attempt goes on from."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from service.training.checkpoint import (
    LatestCheckpoint,
    UnusableCheckpoint,
    checkpoint_path,
    latest_checkpoint,
    read_checkpoint,
)
from service.training.context import RankContext


def find_checkpoint(context: RankContext, fingerprint: str) -> LatestCheckpoint:
    """The newest checkpoint that is good on every rank, or none where no rank sees any. All ranks must call.

    Every rank reads and verifies by itself, and one exchange finds the oldest of their findings, so that ranks never
    go on from different steps. A checkpoint of a step that was not told to the service (``context.told_step``) is
    passed over where there is an older one, so that the steps that were lost are measured again. Where no rank sees
    any, ``context.start_checkpoint`` counts.

    Raises: UnusableCheckpoint if only some ranks see a checkpoint, if it belongs to a run with another fingerprint, or
        if the start checkpoint is not whole.
    """
    folder = context.checkpoint_folder
    found = latest_checkpoint(folder, context.told_step)
    step = found.checkpoint.step if found.checkpoint else 0
    lowest, highest = _range_over_ranks(step, context)
    if lowest == 0 and highest > 0:
        raise UnusableCheckpoint(
            f"some ranks see a good checkpoint of step {highest} and others none in {folder}; "
            "the storage folder must be one folder that every worker reaches under this path"
        )
    if lowest < step:
        older = f"step {step} is good here and not on every rank; going on from step {lowest}"
        found = LatestCheckpoint(read_checkpoint(checkpoint_path(folder, lowest)), (*found.problems, older))
    if found.checkpoint is None and context.start_checkpoint is not None:
        return _of_another_job(context.start_checkpoint, fingerprint, found.problems)
    if found.checkpoint and found.checkpoint.fingerprint != fingerprint:
        raise UnusableCheckpoint(
            f"the checkpoints in {folder} belong to a job with other numbers (model, data, optimizer, seed or global "
            "batch differ); choose another storage folder, or go on with the spec they were made with"
        )
    return found


def _of_another_job(path: Path, fingerprint: str, problems: tuple[str, ...]) -> LatestCheckpoint:
    try:
        checkpoint = read_checkpoint(path)
    except UnusableCheckpoint as error:
        raise UnusableCheckpoint(
            f"the start checkpoint {path} cannot be used: {error}; start from another one, or from the beginning"
        ) from error
    if checkpoint.fingerprint != fingerprint:
        raise UnusableCheckpoint(
            f"the start checkpoint {path} belongs to a job with other numbers (model, data, optimizer, seed or global "
            "batch differ); start from the beginning, or submit the spec it was made with"
        )
    return LatestCheckpoint(replace(checkpoint, requests_met=0), problems)  # it counted the other job's requests


def _range_over_ranks(step: int, context: RankContext) -> tuple[int, int]:
    if context.world_size == 1:
        return step, step
    bounds = torch.tensor([step, -step], device=context.device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MIN)
    lowest, highest = bounds.tolist()
    return lowest, -highest
