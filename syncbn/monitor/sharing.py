"""Sharing: which ranks normalize by the same statistics, and who does not hold what the others hold."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.batchnorm import SyncBatchNorm
from syncbn.monitor.heard import Heard


def num_sharing(layers: Iterable[_BatchNorm], group: ProcessGroup | None) -> list[int]:
    """By layer, how many ranks of ``group`` share its statistics, this one included; 1 if it is not synchronized."""
    ranks = {0} if group is None else set(dist.get_process_group_ranks(group))
    return [len(ranks.intersection(_partners(layer))) if len(ranks) > 1 else 1 for layer in layers]


def are_synchronized(ranks: Heard) -> list[bool]:
    """By layer, whether all ranks normalize by the same statistics. From what all have said, so on each the same."""
    everywhere: list[bool] = (ranks.num_sharing == len(ranks.num_sharing)).all(0).tolist()
    return everywhere


def differing_ranks(ranks: Heard, layer: int) -> tuple[int, ...]:
    """Who is at fault if not all hold the same running statistics in this layer; see `BatchNormSample`."""
    digests, sharing = ranks.digest[:, layer].tolist(), ranks.num_sharing[:, layer].tolist()
    if len(set(digests)) == 1:
        return ()
    if len(set(sharing)) > 1:
        return _outvoted(sharing)
    return _outvoted(digests) if sharing[0] == len(sharing) else ()


def _partners(layer: _BatchNorm) -> Sequence[int]:
    """The ranks whose batches ``layer`` is normalized by."""
    if not isinstance(layer, SyncBatchNorm | nn.SyncBatchNorm):
        return [dist.get_rank()]
    group: ProcessGroup | None = layer.process_group
    is_member = dist.get_world_size(group) > 0
    return dist.get_process_group_ranks(group) if is_member else [dist.get_rank()]


def _outvoted(votes: Sequence[float]) -> tuple[int, ...]:
    """Who says something else than most; all if nothing is said by most."""
    (vote, most), *others = Counter(votes).most_common()
    usual = vote if all(count < most for _, count in others) else None
    return tuple(rank for rank, own in enumerate(votes) if own != usual)
