"""The states of torch's random generators of all ranks, so that a resumed run draws what it would have drawn."""

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor

from service.training.context import RankContext


def gather_rng_states(context: RankContext) -> Tensor:
    """Every rank's state, uint8 ``(world_size, S)`` on the CPU: the CPU generator's, then a CUDA device's.

    One collective; all ranks must call.
    """
    own = torch.get_rng_state()
    if context.device.type == "cuda":
        own = torch.cat([own, torch.cuda.get_rng_state(context.device)])
    if context.world_size == 1:
        return own.unsqueeze(0)
    own = own.to(context.device)  # NCCL moves device memory only
    states = [torch.empty_like(own) for _ in range(context.world_size)]
    dist.all_gather(states, own)
    return torch.stack(states).cpu()


def restore_rng_state(states: Tensor, context: RankContext) -> None:
    """Put this rank's generators where `gather_rng_states` found them. No communication.

    A rank that was not there then has no state to go back to: its generators are seeded from rank 0's state and its own
    rank, always alike and unlike any other's.
    """
    if context.rank >= len(states):
        torch.manual_seed(_derived_seed(states[0], context.rank))
        return
    own = states[context.rank]
    num_cpu_bytes = torch.get_rng_state().numel()
    torch.set_rng_state(own[:num_cpu_bytes].clone())
    # A run that moves from CPU to CUDA has no such state to restore; its kernels would draw other numbers anyway.
    if context.device.type == "cuda" and own.numel() > num_cpu_bytes:
        torch.cuda.set_rng_state(own[num_cpu_bytes:].clone(), context.device)


def _derived_seed(state: Tensor, rank: int) -> int:
    digest = hashlib.sha256(state.numpy().tobytes() + rank.to_bytes(8, "big")).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # 63 bits: torch takes no more
