"""Joining and leaving the process group of an attempt."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]  # public, yet not marked as exported


def join(rank: int, world_size: int, store: Store, device: torch.device, timeout_s: float) -> None:
    """Make the default process group: NCCL for a CUDA device, gloo else. All ranks must call.

    ``store`` must be fresh for each attempt; ``timeout_s`` bounds the meeting and every collective after it.
    A CPU rank computes with one thread: ranks share the cores of their machine, and threads that spin
    while another rank holds the core cost more than they bring.

    Raises: torch.distributed.DistError or its kin if the other ranks do not come in time.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )


def leave() -> None:
    """End the default process group if there is one. Each rank may call on its own, after its last collective."""
    if dist.is_initialized():
        dist.destroy_process_group()
