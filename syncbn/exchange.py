"""Small float64 vectors between the ranks of a process group: one collective each, every rank gets the same bits.

Over gloo every message opens with a number for what the rank means to exchange, see `syncbn.agreement`. A message may
be shorter than what its receiver has room for, never longer: gloo would end the process. So each rank has room for the
longest message there is, whatever it sends itself; of that memory only what is written to is ever touched.
"""

import time

import torch
import torch.distributed as dist
from torch import Tensor
from torch._library.effects import EffectType
from torch.distributed import ProcessGroup, Work

from syncbn.absence import absence
from syncbn.agreement import TEXT_SIZE, Exchange, digest_of, disagreement, read_text, text_of
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
        total: Tensor = _opaque_sum(vector, process_group.group_name, *exchange)
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
        rows = _agreed_rows(vector, process_group, exchange)
        if rows is not None:
            return torch.stack(rows)
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
        rows = _agreed_rows(vector, process_group, exchange)
        if rows is None:
            dist.all_reduce(vector, group=process_group)
            return vector
        total = rows[0] + rows[1]
        for row in rows[2:]:
            total += row
        return total
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


def _agreed_rows(vector: Tensor, process_group: ProcessGroup, exchange: Exchange) -> list[Tensor] | None:
    """Over gloo, every rank's vector in the order of ranks; None where they are still to be sent.

    Raises RanksDisagree where there are numbers to compare and they differ.
    """
    if not _is_gloo(process_group, vector):
        return None
    assert vector.dtype == torch.float64
    num_peers = process_group.size() - 1
    room = _REPLICATED_VALUES // (num_peers + 1) if num_peers < _REPLICATED_WORLD_SIZE else 0
    fits = vector.is_cpu and vector.numel() <= room
    digest = digest_of(exchange)
    received = torch.empty(num_peers * (1 + room), dtype=torch.float64)
    work = _send_to_all([digest.vector, vector] if fits else [digest.vector], received, process_group)
    # Views are made while the messages are on their way, and few, because they cost as much as the numbers in them.
    digests = received[:: 1 + room]
    rows = list(received.as_strided((num_peers, vector.numel()), (1 + room, 1), 1).unbind()) if fits else None
    work.wait()
    if digests.tolist() != [digest.number] * num_peers:
        raise _refusal(process_group, exchange)
    if rows is not None:
        rows.insert(process_group.rank(), vector)
    return rows


def _is_gloo(process_group: ProcessGroup, vector: Tensor) -> bool:
    backends = dist.get_backend_config(process_group)  # such as cpu:gloo,cuda:nccl
    return ("cpu:gloo" if vector.is_cpu else f"{vector.device.type}:gloo") in backends


def _send_to_all(message: list[Tensor], received: Tensor, process_group: ProcessGroup) -> Work:
    """Start to send the parts of ``message`` to all other ranks, and theirs to as many equal parts of ``received``.

    Theirs may be shorter than such a part.
    """
    num_peers, rank = process_group.size() - 1, process_group.rank()
    copies = torch.cat(message * num_peers)
    sent, expected = [copies.numel() // num_peers] * num_peers, [received.numel() // num_peers] * num_peers
    sent.insert(rank, 0)
    expected.insert(rank, 0)
    # The group's own method: the public function around it costs more than all that is done here.
    return process_group.alltoall_base(received, copies, expected, sent)


def _refusal(process_group: ProcessGroup, exchange: Exchange) -> RanksDisagree:
    """The error for ranks that differ. All of them know that they do, for all have seen the same numbers.

    So all come here and tell each other what they meant, which also leaves the group as it was.
    """
    own = text_of(exchange)
    received = own.new_empty((process_group.size() - 1) * TEXT_SIZE)
    _send_to_all([own], received, process_group).wait()
    texts = [read_text(doubles) for doubles in received.view(-1, TEXT_SIZE)]
    texts.insert(process_group.rank(), read_text(own))
    return disagreement(exchange, dict(zip(dist.get_process_group_ranks(process_group), texts, strict=True)))
