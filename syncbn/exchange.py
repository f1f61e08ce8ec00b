"""Small float64 vectors between the ranks of a process group: one collective each, every rank gets the same bits.

Over gloo every message opens with what the rank means to exchange, see `syncbn.agreement`. A message may be shorter
than what its receiver has room for, never longer: gloo would end the process. So each rank has room for the longest
message there is, whatever it sends itself.
"""

import time

import torch
import torch.distributed as dist
from torch import Tensor
from torch._library.effects import EffectType
from torch.distributed import ProcessGroup, Work

from syncbn.absence import absence
from syncbn.agreement import HEADER_SIZE, Exchange, disagreement, header_of, read_header
from syncbn.errors import RanksDisagree, RanksMissing

_REPLICATED_WORLD_SIZE = 8
_REPLICATED_VALUES = 1 << 17  # a megabyte of doubles, over all ranks


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


def sum_over_ranks(vector: Tensor, process_group: ProcessGroup | None, exchange: Exchange | None = None) -> Tensor:
    """The sum of every rank's ``vector`` (float64); itself without a group. All ranks must call, with equal sizes.

    Cost: one collective. Over gloo, what bounds a small exchange is the number of messages in a row, and a ring
    all-reduce has ``2 (W - 1)``: up to 8 ranks it is faster to send the vector to all at once and add up here, in
    the order of ranks. Beyond, or beyond a megabyte, gloo needs one message more, for the agreement. May overwrite
    ``vector``.
    Raises: RanksDisagree on every rank, if they do not all mean the same ``exchange`` (gloo only: elsewhere it would
        cost a wait for the device). RanksMissing if a rank does not come within the group's timeout.
    """
    if process_group is None:
        return vector
    exchange = exchange or Exchange("sum", num_values=vector.numel())
    if torch.compiler.is_compiling():
        total: Tensor = _opaque_sum(vector, process_group.group_name, *exchange.as_arguments())
        return total
    return _sum(vector, process_group, exchange)


def gather_over_ranks(vector: Tensor, process_group: ProcessGroup | None, exchange: Exchange | None = None) -> Tensor:
    """Every rank's ``vector`` of ``K`` doubles as the rows of ``(W, K)``; all ranks must call, with equal sizes.

    Cost and Raises: as `sum_over_ranks`.
    """
    if process_group is None:
        return vector.unsqueeze(0)
    exchange = exchange or Exchange("gather", num_values=vector.numel())
    start = time.monotonic()
    try:
        others = _agreed_others(vector, process_group, exchange)
        if others is not None:
            return _with_own(others, vector, process_group)
        gathered = [torch.empty_like(vector) for _ in range(process_group.size())]
        dist.all_gather(gathered, vector, group=process_group)
        return torch.stack(gathered)
    except RanksDisagree:
        raise
    except RuntimeError as error:
        raise _explained(error, process_group, exchange, start) from error


def _sum(vector: Tensor, process_group: ProcessGroup, exchange: Exchange) -> Tensor:
    start = time.monotonic()
    try:
        others = _agreed_others(vector, process_group, exchange)
        if others is None:
            dist.all_reduce(vector, group=process_group)
            return vector
        if len(others) == 1:  # in either order the same bits
            return others[0] + vector
        return _with_own(others, vector, process_group).sum(0)
    except RanksDisagree:
        raise
    except RuntimeError as error:
        raise _explained(error, process_group, exchange, start) from error


@torch.library.custom_op("syncbn::sum_over_ranks", mutates_args=())
def _opaque_sum(
    vector: Tensor, group_name: str, purpose: str, layer: str, num_channels: int, dtype: torch.dtype | None, num: int
) -> Tensor:
    """`_sum` as one node of a compiled graph: it looks at values, and torch's own collectives there cost double."""
    process_group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[attr-defined,arg-type]
    return _sum(vector.clone(), process_group, Exchange(purpose, layer, num_channels, dtype, num))


# An empty rank has no use for the sum, yet the others wait for it; and all ranks must keep to one order.
_opaque_sum.register_effect(EffectType.ORDERED)


@_opaque_sum.register_fake
def _(vector: Tensor, *_: object) -> Tensor:
    return torch.empty_like(vector)


def _explained(error: RuntimeError, process_group: ProcessGroup, exchange: Exchange, start: float) -> RanksMissing:
    """What torch, which has no class of its own for it, reports of an exchange that began at ``start``."""
    return absence(process_group, exchange, time.monotonic() - start, error)


def _agreed_others(vector: Tensor, process_group: ProcessGroup, exchange: Exchange) -> Tensor | None:
    """Over gloo, the other ranks' vectors as the rows of ``(W - 1, K)``; None where they are still to be sent.

    Raises RanksDisagree where there are headers and they differ.
    """
    if f"{vector.device.type}:gloo" not in dist.get_backend_config(process_group):
        return None
    assert vector.dtype == torch.float64
    world_size = process_group.size()
    room = _REPLICATED_VALUES // world_size if world_size <= _REPLICATED_WORLD_SIZE else 0
    fits = vector.device.type == "cpu" and vector.numel() <= room
    header = header_of(exchange)
    message = torch.cat([header, vector]) if fits else header
    received = vector.new_empty(world_size - 1, HEADER_SIZE + room, device="cpu")
    work = _send_to_all(message, received, process_group)
    # Views are made while the messages are on their way.
    headers, others = received[:, :HEADER_SIZE], received[:, HEADER_SIZE : message.numel()]
    expected = header.expand_as(headers)
    work.wait()
    if not torch.equal(headers, expected):
        raise _refusal(headers, process_group, exchange)
    return others if fits else None


def _with_own(others: Tensor, vector: Tensor, process_group: ProcessGroup) -> Tensor:
    rank = process_group.rank()
    return torch.cat([others[:rank], vector.unsqueeze(0), others[rank:]])


def _send_to_all(message: Tensor, received: Tensor, process_group: ProcessGroup) -> Work:
    """Start to send ``message`` to all other ranks, and theirs, which may be shorter, to the rows of ``received``."""
    num_peers, room = received.shape
    copies = message if num_peers == 1 else message.repeat(num_peers)
    sent, expected = [message.numel()] * num_peers, [room] * num_peers
    for sizes in (sent, expected):
        sizes.insert(process_group.rank(), 0)
    # The group's own method: the public function around it costs more than all that is done here.
    return process_group.alltoall_base(received.view(-1), copies, expected, sent)


def _refusal(headers: Tensor, process_group: ProcessGroup, exchange: Exchange) -> RanksDisagree:
    texts = [read_header(header) for header in headers]
    texts.insert(process_group.rank(), read_header(header_of(exchange)))
    return disagreement(exchange, dict(zip(dist.get_process_group_ranks(process_group), texts, strict=True)))
