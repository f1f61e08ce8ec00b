"""Proofs of a model: what they change, whom they wait for, and that they are those of the model itself."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.planted_faults.plants import StaysInTraining
from service.jobs import (
    CheckpointSaved,
    JobSpec,
    ModeFault,
    ModeFaultKind,
    ResumeCertificate,
    TelemetryEvent,
    TrainingFinished,
)
from service.training.certificate import Prover
from service.training.loop import train
from service.training.mlp import mlp
from service.training.resnet import ResNet20
from syncbn import convert_sync_batchnorm
from tests.ranks import run_ranks
from tests.service.training.runs import of, own_context, tiny_spec

_BFLOAT16 = partial(torch.autocast, "cpu", torch.bfloat16)


@pytest.mark.parametrize("build", [lambda: ResNet20(1, 10, 4, 0.1), lambda: mlp(64, (16, 16), 10, 0.1)])
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, nullcontext), (torch.float64, nullcontext), (torch.float32, _BFLOAT16)]
)
def test_a_proof_is_the_loss_of_the_model_to_the_last_bit_and_leaves_it_as_it_was(
    build: Callable[[], nn.Module], dtype: torch.dtype, autocast: Callable[[], AbstractContextManager[object]]
) -> None:
    torch.manual_seed(0)
    model = convert_sync_batchnorm(build()).to(dtype)
    images, labels = torch.randn(16, 1, 8, 8, dtype=dtype), torch.arange(16) % 10
    model(3 * images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    proof = Prover(images, labels, 1, autocast).prove(model)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad(), autocast():
        logits = model.eval()(images).double()
    assert proof.probe_loss.hex() == float(F.cross_entropy(logits, labels)).hex()


def test_a_layer_that_stays_in_training_mode_is_told_and_the_run_ends_by_itself(tmp_path: Path) -> None:
    spec = tiny_spec(
        tmp_path,
        data="builtin:digits",
        max_steps=6,
        cadence={"checkpoint_every_steps": 2, "evaluate_every_steps": 3, "drift_every_steps": 3},
    )
    first, second = run_ranks(2, _train_with_fault, spec, tmp_path)
    assert [saved.step for saved in of(CheckpointSaved, first)] == [2, 4, 6]
    kinds = {fault.kind for fault in of(ModeFault, first)}
    assert kinds == {ModeFaultKind.MOVED_IN_EVALUATION, ModeFaultKind.BATCH_IN_EVALUATION}
    assert all(len(of(TrainingFinished, events)) == 1 for events in (first, second))
    again, _ = run_ranks(2, _train_with_fault, spec, tmp_path)
    (certificate,) = of(ResumeCertificate, again)
    assert certificate.exact


def _train_with_fault(spec: JobSpec, storage: Path) -> list[TelemetryEvent]:
    with StaysInTraining(layer="norm2"):
        return list(train(spec, own_context(storage)))


def test_such_a_layer_is_told_before_it_ends_a_run_whose_ranks_judge_unequally_many_batches(tmp_path: Path) -> None:
    """A thousand images of digits are four batches, which three ranks cannot share evenly."""
    spec = tiny_spec(
        tmp_path,
        num_workers=3,
        data="builtin:digits",
        max_steps=2,
        cadence={"evaluate_every_steps": 2, "drift_every_steps": 2},
    )
    (told, error), *others = run_ranks(3, _train_to_an_error, spec, tmp_path)
    assert [(fault.kind, fault.layer) for fault in told] == [(ModeFaultKind.BATCH_IN_EVALUATION, "norm2")]
    assert all(words.startswith("RanksDisagree") and "'norm2'" in words for words in (error, *(w for _, w in others)))


def _train_to_an_error(spec: JobSpec, storage: Path) -> tuple[list[ModeFault], str]:
    faults: list[ModeFault] = []
    try:
        with StaysInTraining(layer="norm2"):
            faults.extend(event for event in train(spec, own_context(storage)) if isinstance(event, ModeFault))
    except RuntimeError as error:
        return faults, f"{type(error).__name__}: {error}"
    return faults, ""
