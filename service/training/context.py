"""Where a rank stands: what it must be told that no spec says."""

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class RankContext:
    """One of ``world_size`` ranks of an attempt.

    ``storage`` is the job's folder, the same path on every rank; checkpoints go to ``storage / "checkpoints"``.
    With more than one rank the default process group must exist before training starts and outlive it.
    ``told_step`` is how far every rank has told its steps: of checkpoints those beyond it are the second choice.
    ``start_checkpoint`` is a checkpoint of another job to begin from where ``storage`` holds none.
    """

    rank: int
    world_size: int
    device: torch.device
    storage: Path
    attempt: int = 1
    start_checkpoint: Path | None = None
    told_step: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not in 0..{self.world_size - 1}")

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for the run: it writes checkpoints and tells what all ranks found together."""
        return self.rank == 0

    @property
    def checkpoint_folder(self) -> Path:
        """Where the checkpoints of every attempt lie."""
        return self.storage / "checkpoints"
