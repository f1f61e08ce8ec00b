"""``python -m service.training SPEC.json --storage DIR``: one job without the service, alone or under torchrun.

Rank 0 prints its events as JSON lines; errors go to standard error. SIGTERM, of which torchrun tells its processes,
lets the ranks save a checkpoint and leave. Exit status: 0 finished, 1 failed, 2 for a wrong spec, 3 stopped.
"""

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from service.jobs import JobSpec, StoppedEarly
from service.training import process_group
from service.training.context import RankContext
from service.training.loop import train
from service.training.orders import Orders


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job, and give the exit status."""
    options = _parser().parse_args(arguments)
    try:
        spec = JobSpec.model_validate_json(options.spec.read_bytes())
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{options.spec}: {error}\n")
        return 2
    told_to_stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda _signum, _frame: told_to_stop.set())
    context = _join(spec, options)
    status = 0
    try:
        for event in train(spec, context, lambda: Orders(stop=told_to_stop.is_set())):
            if isinstance(event, StoppedEarly):
                status = 3
            if context.leads:
                sys.stdout.write(event.model_dump_json() + "\n")
                sys.stdout.flush()
    finally:
        process_group.leave()
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m service.training", description=__doc__)
    parser.add_argument("spec", type=Path, help="a job spec as JSON, as POST /v1/jobs takes it")
    parser.add_argument("--storage", type=Path, required=True, help="folder for the checkpoints, resumed from")
    parser.add_argument("--start-checkpoint", type=Path, help="checkpoint to begin from where the folder has none")
    return parser


def _join(spec: JobSpec, options: argparse.Namespace) -> RankContext:
    """Take the place that torchrun gives this process, or stand alone."""
    storage, start = options.storage.absolute(), options.start_checkpoint
    if not dist.is_torchelastic_launched():
        return RankContext(0, 1, _device(spec, 0), storage, start_checkpoint=start)
    store, rank, world_size = next(rendezvous("env://"))
    device = _device(spec, dist.get_node_local_rank())
    process_group.join(rank, world_size, store, device, spec.timeouts.collective_s)
    return RankContext(rank, world_size, device, storage, start_checkpoint=start)


def _device(spec: JobSpec, local_rank: int) -> torch.device:
    return torch.device("cuda", local_rank) if spec.resources.gpus else torch.device("cpu")


def _exit(status: int) -> NoReturn:
    """End the process without winding up the interpreter.

    A thread of gloo may still be letting go of a tensor of its last collective, for which it needs the interpreter: if
    that is just shutting down, the thread aborts the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    try:
        _exit(main())
    except Exception:
        traceback.print_exc()
        _exit(1)
