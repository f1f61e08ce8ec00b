"""Small float64 vectors between the ranks of a process group: one collective each, every rank gets the same bits."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

_REPLICATED_WORLD_SIZE = 8
_REPLICATED_BYTES = 1 << 20


def peers(process_group: ProcessGroup | None) -> ProcessGroup | None:
    """The group to exchange with, or None where this process is alone.

    Without a group of its own it is the default group, if `torch.distributed` is initialized.

    Raises:
        ValueError: if this process is not a member of ``process_group``.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    world_size = dist.get_world_size(process_group)
    if world_size < 1:
        raise ValueError("this rank is not a member of the process group; pass the group it belongs to")
    if world_size == 1:
        return None
    return process_group if process_group is not None else dist.group.WORLD


def sum_over_ranks(vector: Tensor, process_group: ProcessGroup | None) -> Tensor:
    """The sum of every rank's ``vector``; itself without a group. All ranks must call, with the same size.

    Cost: one collective. Over gloo, what bounds a small exchange is the number of messages in a row, and a ring
    all-reduce has ``2 (W - 1)``: up to 8 ranks it is faster to send the vector to all at once and add up here, in
    the order of ranks. May overwrite ``vector``.
    """
    if process_group is None:
        return vector
    if _is_replicated(vector, process_group):
        return _replicate(vector, process_group).sum(0)
    dist.all_reduce(vector, group=process_group)
    return vector


def gather_over_ranks(vector: Tensor, process_group: ProcessGroup | None) -> Tensor:
    """Every rank's ``vector`` of ``K`` values as the rows of ``(W, K)``; all ranks must call, with the same size.

    Cost: one collective.
    """
    if process_group is None:
        return vector.unsqueeze(0)
    if _is_replicated(vector, process_group):
        return _replicate(vector, process_group)
    rows = [torch.empty_like(vector) for _ in range(process_group.size())]
    dist.all_gather(rows, vector, group=process_group)
    return torch.stack(rows)


def _is_replicated(vector: Tensor, process_group: ProcessGroup) -> bool:
    world_size = process_group.size()
    return (
        vector.device.type == "cpu"
        and world_size <= _REPLICATED_WORLD_SIZE
        and world_size * vector.nbytes <= _REPLICATED_BYTES
        and dist.get_backend(process_group) == "gloo"
    )


def _replicate(vector: Tensor, process_group: ProcessGroup) -> Tensor:
    copies = vector.repeat(process_group.size(), 1)  # (W, K)
    received = torch.empty_like(copies)
    dist.all_to_all_single(received, copies, group=process_group)
    return received
