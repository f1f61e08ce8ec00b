"""What the library itself says after a run, because no job has ranks with unequal batches."""

import torch
import torch.distributed as dist
from torch import nn

from service.jobs import JobSpec
from service.training.context import RankContext
from service.training.dataset import load_dataset
from syncbn import SyncBatchNorm
from syncbn.layers import running_moments
from syncbn.monitor import BatchNormMonitor

Findings = dict[str, float]

_UNEVEN = (8, 8, 8, 1)
_UNEVEN_STEPS = 20


def uneven_ranks(spec: JobSpec, context: RankContext) -> Findings:
    """Twenty steps with 8, 8, 8 and 1 images a rank: how far the statistics are from one process's, and what is found.

    ``error`` is relative to the largest value of a buffer.
    """
    dataset = load_dataset(spec.data)
    images = dataset.train_images.flatten(1).double()
    start = sum(_UNEVEN[: context.rank])
    own, joined = _layers(images.shape[1], SyncBatchNorm), _layers(images.shape[1], nn.BatchNorm1d)
    joined.load_state_dict(own.state_dict())
    joined.requires_grad_(False)
    random = torch.Generator().manual_seed(spec.seed)
    alarms = 0
    with BatchNormMonitor(own, every=1) as monitor:
        for _ in range(_UNEVEN_STEPS):
            batch = images[torch.randperm(len(images), generator=random)[: sum(_UNEVEN)]]
            own(batch[start : start + _UNEVEN[context.rank]])
            joined(batch)
            sample = monitor.step()
            assert sample is not None
            alarms = sum(finding.fires for finding in sample.ranks) + len(sample.repeating_ranks)
            alarms += len(sample.differing_ranks or {})
    return {"error": _largest_error(own, joined), "alarms": float(alarms)}


def _layers(num_inputs: int, kind: type[SyncBatchNorm] | type[nn.BatchNorm1d]) -> nn.Sequential:
    torch.manual_seed(dist.get_world_size())
    parts: list[nn.Module] = [nn.Linear(num_inputs, 64), kind(64), nn.ReLU(), nn.Linear(64, 64), kind(64)]
    return nn.Sequential(*parts).double()


def _largest_error(one: nn.Sequential, other: nn.Sequential) -> float:
    pairs = [
        pair
        for mine, theirs in zip(one, other, strict=True)
        if isinstance(mine, SyncBatchNorm) and isinstance(theirs, nn.BatchNorm1d)
        for pair in zip(running_moments(mine), running_moments(theirs), strict=True)
    ]
    return max(float((mine - theirs).abs().max() / theirs.abs().max()) for mine, theirs in pairs)
