"""Whether a run that was restored is the run that was saved: told from the model itself, not from a file's checksum."""

import hashlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.jobs import ResumeCertificate
from service.training.dataset import Dataset
from service.training.lone_copy import lone_copy

NUM_PROBE_IMAGES = 64
"""The first of the validation images: the same ones however many ranks there are."""


@dataclass(frozen=True)
class Proof:
    """What a model is known by: its loss on the probe batch in nats, and SHA-256 digests of what it consists of."""

    num_workers: int
    probe_loss: float
    parameters_sha256: str
    statistics_sha256: str


@dataclass(frozen=True)
class Prover:
    """Makes proofs of one run's model. ``autocast`` makes the context that every forward pass runs in."""

    images: Tensor
    labels: Tensor
    num_workers: int
    autocast: Callable[[], AbstractContextManager[object]]

    def prove(self, model: nn.Module) -> Proof:
        """The proof of ``model`` as it stands; it is left as it was.

        Cost: one forward pass of at most 64 images in evaluation mode, a copy of the model, another one to the CPU and
        its SHA-256; no exchange, so one rank may do it alone.
        """
        # A layer that stays in training mode would wait for other ranks, and move its running statistics.
        probed = lone_copy(model).eval()
        with torch.no_grad(), self.autocast():
            logits = probed(self.images).double()
        return Proof(
            num_workers=self.num_workers,
            probe_loss=F.cross_entropy(logits, self.labels).item(),
            parameters_sha256=_digest(model.named_parameters()),
            statistics_sha256=_digest(_statistics(model)),
        )


def make_prover(dataset: Dataset, num_workers: int, autocast: Callable[[], AbstractContextManager[object]]) -> Prover:
    """The prover of a run on ``dataset``."""
    images, labels = dataset.validation_images[:NUM_PROBE_IMAGES], dataset.validation_labels[:NUM_PROBE_IMAGES]
    return Prover(images, labels, num_workers, autocast)


def certify(step: int, saved: Proof, restored: Proof) -> ResumeCertificate:
    """Both proofs side by side."""
    same_loss = saved.probe_loss.hex() == restored.probe_loss.hex()  # to the last bit; NaN is like NaN
    return ResumeCertificate(
        step=step,
        saved_by_num_workers=saved.num_workers,
        num_workers=restored.num_workers,
        saved_probe_loss=saved.probe_loss,
        restored_probe_loss=restored.probe_loss,
        saved_parameters_sha256=saved.parameters_sha256,
        restored_parameters_sha256=restored.parameters_sha256,
        saved_statistics_sha256=saved.statistics_sha256,
        restored_statistics_sha256=restored.statistics_sha256,
        exact=same_loss and not altered_parts(saved, restored),
    )


def altered_parts(saved: Proof, restored: Proof) -> list[str]:
    """Which parts of the model are not, bit for bit, those that were saved."""
    digests = {
        "parameters": (saved.parameters_sha256, restored.parameters_sha256),
        "running statistics": (saved.statistics_sha256, restored.statistics_sha256),
    }
    return [part for part, (one, other) in digests.items() if one != other]


def _statistics(model: nn.Module) -> list[tuple[str, Tensor]]:
    parameters = dict(model.named_parameters())
    return [(name, value) for name, value in model.state_dict().items() if name not in parameters]


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over the tensors in the order of their names: name, type, shape and bits of each."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda named: named[0]):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
