"""``python -m service.training.ship CHECKPOINT -o WEIGHTS.pt``: a model to deploy, out of a checkpoint of training.

Writes a plain torch state dict, and beside it, as ``WEIGHTS.pt.json``, what is known of its running statistics. Where
the checkpoint holds population statistics (``recompute_bn``) these are shipped. Else the running ones are, if nothing
speaks against them; ``--anyway`` ships them whatever does, and the file beside them says so.
Exit status: 0 shipped, 2 the checkpoint cannot be read, 3 not shipped because the statistics are in doubt.
"""

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from service.training.checkpoint import Checkpoint, UnusableCheckpoint, read_checkpoint
from service.training.durable import write_atomically
from service.training.shipping import doubts, shippable_state


def main(arguments: Sequence[str] | None = None) -> int:
    """Ship the checkpoint, and give the exit status."""
    options = _parser().parse_args(arguments)
    try:
        checkpoint = read_checkpoint(options.checkpoint)
    except UnusableCheckpoint as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if checkpoint.population_statistics is not None:
        _write(options.output, checkpoint, shippable_state(checkpoint), "population", [])
        return 0
    against = doubts(checkpoint)
    if against and not options.anyway:
        sys.stderr.write(
            f"{options.checkpoint.name} is not shipped. {' '.join(against)} "
            "Set recompute_bn in the job's spec and resume it, or ship with --anyway.\n"
        )
        return 3
    _write(options.output, checkpoint, dict(checkpoint.model), "running", against)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m service.training.ship", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint's .pt file; its manifest lies beside it")
    parser.add_argument("-o", "--output", type=Path, required=True, help="where the state dict goes, such as model.pt")
    parser.add_argument("--anyway", action="store_true", help="ship running statistics whatever speaks against them")
    return parser


def _write(path: Path, checkpoint: Checkpoint, state: dict[str, Tensor], statistics: str, against: list[str]) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    certificate = checkpoint.statistics
    beside = {
        "file": path.name,
        "sha256": hashlib.sha256(buffer.getbuffer()).hexdigest(),
        "step": checkpoint.step,
        "statistics": statistics,
        "certificate": certificate and certificate.model_dump(mode="json"),
        "doubts": against,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getbuffer())
    write_atomically(path.with_name(f"{path.name}.json"), json.dumps(beside, indent=1).encode())


if __name__ == "__main__":
    sys.exit(main())
