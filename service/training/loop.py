"""The training loop: from a spec and a rank's place to the stream of what happened."""

import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from service.jobs import (
    CheckpointSaved,
    JobSpec,
    LogLine,
    Normalization,
    Phase,
    PhaseChanged,
    Precision,
    RankStarted,
    Sgd,
    StepMetrics,
    StoppedEarly,
    TelemetryEvent,
    TrainingFinished,
)
from service.training.certificate import Prover, altered_parts, certify, make_prover
from service.training.checkpoint import Checkpoint, CheckpointFailed, fingerprint, write_checkpoint
from service.training.context import RankContext
from service.training.dataset import load_dataset
from service.training.evaluation import make_examiner
from service.training.inspection import Inspector
from service.training.layer_samples import LayerSampler
from service.training.meeting import Meetings, said_by_rank_zero
from service.training.models import build_model
from service.training.non_finite import first_non_finite
from service.training.orders import Orders
from service.training.resume import find_checkpoint
from service.training.rng import gather_rng_states, restore_rng_state
from service.training.sampler import BatchSampler
from service.training.schedule import check_schedule, learning_rate

__all__ = ["Orders", "RankContext", "train"]


def train(spec: JobSpec, context: RankContext, orders: Callable[[], Orders] = Orders) -> Iterator[TelemetryEvent]:
    """Train the job on this rank, and tell what happens as it happens.

    Every rank of ``context.world_size`` must run this and take every event: ranks meet inside. Every rank yields
    RankStarted, StepMetrics for each step, and TrainingFinished; rank 0 also yields what concerns the
    run as a whole. Goes on from the newest good checkpoint in the storage folder; on CPUs an interrupted
    and resumed run gives bit for bit the losses and weights of one that was never interrupted. With another number of
    workers and the same global batch it gives them to rounding, under synchronized normalization. A loss that is not
    finite is reported like any other.

    ``orders`` is asked from time to time what is wanted of the run; rank 0's answer counts, for all ranks at the same
    step. A run told to stop saves a checkpoint and yields StoppedEarly instead of TrainingFinished, unless it comes to
    its end first.

    Raises: ValueError if spec and context or spec and data do not fit, FileNotFoundError if the data are not there,
        UnusableCheckpoint if the storage folder or the start checkpoint belongs to another run, CheckpointFailed if
        the last checkpoint, or the one to stop with, cannot be written (any other is only reported), and what torch
        raises when a rank is lost.
    """
    _check_world_size(spec, context)
    started = time.monotonic()
    if context.leads:
        yield PhaseChanged(phase=Phase.LOADING)
    dtype = torch.float64 if spec.precision is Precision.FLOAT64 else torch.float32
    dataset = load_dataset(spec.data).to(context.device, dtype)
    sampler = BatchSampler(
        len(dataset.train_images), spec.batch_size_per_worker, context.rank, context.world_size, spec.seed
    )
    total_steps = spec.max_steps or (spec.epochs or 0) * sampler.steps_per_epoch
    check_schedule(spec.schedule, total_steps)

    torch.manual_seed(spec.seed)  # alike on all ranks: the first weights come from here
    model = build_model(spec.model, dataset.sample_shape, dataset.num_classes, spec.bn_momentum)
    model = _normalized(model, spec.normalization).to(context.device, dtype)
    optimizer = _make_optimizer(spec, model)
    autocast = _autocast(spec.precision, context.device)
    examiner = make_examiner(dataset, context, autocast, spec.normalization_batch_size)
    prover = make_prover(dataset, context.world_size, autocast)

    run = fingerprint(spec)
    found = find_checkpoint(context, run)
    first_step, requests_met = 1, 0
    if found.checkpoint:
        model.load_state_dict(found.checkpoint.model)
        optimizer.load_state_dict(found.checkpoint.optimizer)
        restore_rng_state(found.checkpoint.rng_states, context)
        first_step, requests_met = found.checkpoint.step + 1, found.checkpoint.requests_met
    replica = _replicated(model, spec.normalization, context)

    for problem in found.problems:
        yield LogLine(level="warning", text=f"unusable checkpoint: {problem}")
    yield RankStarted(
        world_size=context.world_size,
        host=socket.gethostname(),
        pid=os.getpid(),
        device=str(context.device),
        resumed_step=first_step - 1,
        total_steps=total_steps,
        steps_per_epoch=sampler.steps_per_epoch,
        num_train_images=len(dataset.train_images),
        num_validation_images=len(dataset.validation_images),
        num_classes=dataset.num_classes,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        torch_version=torch.__version__,
        syncbn_version=syncbn.__version__,
    )
    if context.leads:
        origin = f"goes on after step {first_step - 1}" if found.checkpoint else "starts from the beginning"
        yield LogLine(text=f"attempt {context.attempt} {origin}, {total_steps} steps in all")
        if found.checkpoint:
            yield from _certify(found.checkpoint, prover, model, spec)
        yield PhaseChanged(phase=Phase.TRAINING)

    inspector = Inspector(spec, model, examiner, dataset.validation_images, found.checkpoint)
    layer_sampler = LayerSampler(model, spec.diagnostics.sample_every_steps, first_step, leads=context.leads)
    meetings = Meetings(context, orders, last_step=first_step - 1)
    was_finite = True
    for step in range(first_step, total_steps + 1):
        began = time.perf_counter()
        rate = learning_rate(step, spec.optimizer.learning_rate, spec.schedule, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = sampler.indices(step).to(context.device)
        with autocast():
            logits = replica(dataset.train_images[batch])
        loss = F.cross_entropy(logits.to(dtype), dataset.train_labels[batch])
        torch.autograd.backward(loss)  # DDP averages the gradients over the ranks
        loss_value = loss.item()
        if was_finite and not math.isfinite(loss_value):  # while the weights are still those that gave it
            yield first_non_finite(model, dataset.train_images[batch], dataset.train_labels[batch], step, autocast)
        was_finite = math.isfinite(loss_value)
        optimizer.step()
        optimizer.zero_grad()
        inspector.after_step()
        sample = layer_sampler.after_step()
        yield StepMetrics(
            step=step,
            epoch=sampler.epoch(step),
            loss=loss_value,
            learning_rate=rate,
            step_s=time.perf_counter() - began,
        )

        if sample:
            yield sample

        asked = meetings.after(step) if step < total_steps else Orders()
        is_due = partial(_is_due, step, total_steps, sampler.steps_per_epoch)
        evaluates, measures_drift = is_due(spec.cadence.evaluate_every_steps), is_due(spec.cadence.drift_every_steps)
        owes_checkpoint = asked.stop or asked.checkpoint_requests > requests_met
        saves = owes_checkpoint or is_due(spec.cadence.checkpoint_every_steps)
        if evaluates or measures_drift:
            yield from inspector.look(
                step,
                sampler.epoch(step),
                evaluates=evaluates,
                measures_drift=measures_drift,
                is_last=step == total_steps,
            )
        if saves:
            requests_met = max(requests_met, asked.checkpoint_requests)
            rng_states = gather_rng_states(context)
            statistics, population_statistics = inspector.certify(step)
            if context.leads:
                checkpoint = Checkpoint(
                    step=step,
                    fingerprint=run,
                    model=model.state_dict(),
                    optimizer=optimizer.state_dict(),
                    rng_states=rng_states,
                    requests_met=requests_met,
                    proof=prover.prove(model),
                    statistics=statistics,
                    population_statistics=population_statistics,
                    has_no_start=inspector.has_no_start,
                    best_step=inspector.best.step,
                    best_losses=inspector.best.losses,
                )
                yield from _save(checkpoint, context, is_needed=asked.stop or step == total_steps)
        if asked.stop:
            # Rank 0 comes here once it has saved, or fails before: nobody says "saved" who does not know it.
            said_by_rank_zero([step], context)
            yield StoppedEarly(step=step, checkpoint_saved=True)
            return
        if context.leads and step < total_steps and (evaluates or measures_drift or saves):
            yield PhaseChanged(phase=Phase.TRAINING)
    yield TrainingFinished(step=total_steps, duration_s=time.monotonic() - started)


def _check_world_size(spec: JobSpec, context: RankContext) -> None:
    if spec.num_workers != context.world_size:
        raise ValueError(
            f"the spec asks for num_workers {spec.num_workers}, and {context.world_size} started; "
            f"start {spec.num_workers} (torchrun --nproc_per_node={spec.num_workers}), or change num_workers"
        )


def _normalized(model: nn.Module, normalization: Normalization) -> nn.Module:
    if normalization is Normalization.SYNC:
        return syncbn.convert_sync_batchnorm(model)
    return model


def _replicated(model: nn.Module, normalization: Normalization, context: RankContext) -> nn.Module:
    """The model as the step calls it. One rank alone needs no gradients from others."""
    if context.world_size == 1:
        return model
    device_ids = [context.device] if context.device.type == "cuda" else None
    replica = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    # Synchronized buffers are equal by themselves; local ones follow rank 0's, as DDP does unless told not to.
    # The attribute, because the argument for it has one name before torch 2.13 and another since.
    replica.broadcast_buffers = normalization is Normalization.LOCAL
    return replica


def _make_optimizer(spec: JobSpec, model: nn.Module) -> torch.optim.Optimizer:
    chosen = spec.optimizer
    if isinstance(chosen, Sgd):
        return torch.optim.SGD(
            model.parameters(),
            lr=chosen.learning_rate,
            momentum=chosen.momentum,
            weight_decay=chosen.weight_decay,
            nesterov=chosen.nesterov,
        )
    return torch.optim.AdamW(
        model.parameters(), lr=chosen.learning_rate, betas=chosen.betas, weight_decay=chosen.weight_decay
    )


def _autocast(precision: Precision, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    if precision is Precision.BFLOAT16:
        return partial(torch.autocast, device.type, torch.bfloat16)
    return nullcontext


def _is_due(step: int, total_steps: int, steps_per_epoch: int, every_steps: int | None) -> bool:
    return step == total_steps or step % (every_steps or steps_per_epoch) == 0


def _certify(checkpoint: Checkpoint, prover: Prover, model: nn.Module, spec: JobSpec) -> Iterator[TelemetryEvent]:
    """Tell whether the restored model is the one that was saved, and what else is not as it was. Rank 0 alone."""
    if checkpoint.num_workers != spec.num_workers and spec.normalization is Normalization.LOCAL:
        before = spec.global_batch_size // checkpoint.num_workers
        yield LogLine(
            level="warning",
            text=f"saved by {checkpoint.num_workers} workers, resumed by {spec.num_workers}: with local normalization "
            f"a batch statistic is now taken over {spec.batch_size_per_worker} images instead of {before}, so the run "
            "is not the one that was interrupted; normalization sync does not change with the number of workers",
        )
    if checkpoint.proof is None:
        return
    restored = prover.prove(model)
    certificate = certify(checkpoint.step, checkpoint.proof, restored)
    yield certificate
    if altered := altered_parts(checkpoint.proof, restored):
        yield LogLine(
            level="error",
            text=f"the {' and '.join(altered)} in the checkpoint of step {checkpoint.step} are not those that were "
            f"saved, although its checksum is right: the file was altered (probe loss {certificate.saved_probe_loss!r} "
            f"then, {certificate.restored_probe_loss!r} now); the run goes on with what it holds",
        )


def _save(checkpoint: Checkpoint, context: RankContext, is_needed: bool) -> Iterator[TelemetryEvent]:
    yield PhaseChanged(phase=Phase.CHECKPOINTING)
    began = time.perf_counter()
    try:
        path = write_checkpoint(context.checkpoint_folder, checkpoint)
    except OSError as error:
        problem = f"the checkpoint of step {checkpoint.step} cannot be written to {context.checkpoint_folder}: {error}"
        if is_needed:
            raise CheckpointFailed(error.errno, f"{problem}; make room there and retry") from error
        # Training is worth more than this one file; the one before it stays good.
        yield LogLine(level="error", text=f"{problem}; training goes on, older checkpoints stay")
        return
    yield CheckpointSaved(
        step=checkpoint.step,
        path=str(path),
        size_bytes=path.stat().st_size,
        duration_s=time.perf_counter() - began,
        statistics=checkpoint.statistics,
    )
