"""What leaves with a checkpoint's weights: the running statistics to ship, and what is known of them."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from service.jobs import Drift, Evaluation, Interval, StatisticsCertificate, loss_damage_colour
from service.training.checkpoint import Checkpoint
from syncbn import BatchMoments, Estimator
from syncbn.layers import tracked_layers


def certify_statistics(
    model: nn.Module, drift: Drift, evaluation: Evaluation | None, *, recomputed: bool
) -> StatisticsCertificate | None:
    """What is known of the running statistics of ``model``; None for one that has none.

    ``evaluation`` is the last of the run, and says nothing of statistics that were replaced since: give None then.
    """
    if not drift.layers:
        return None
    worst = max(drift.layers, key=lambda layer: layer.rms_mean_shift)
    return StatisticsCertificate(
        estimator=Estimator.POOLED.value,
        num_images=drift.num_population_images,
        recomputed=recomputed,
        worst_layer=worst.layer,
        rms_mean_shift=worst.rms_mean_shift,
        initial_weight=max(layer.initial_weight or 0.0 for layer in drift.layers),
        lag_steps=max(layer.lag_steps or 0.0 for layer in drift.layers),
        num_batches=min(_num_batches(model)),
        measured_step=drift.step,
        evaluated_step=evaluation and evaluation.step,
        loss_damage=evaluation and evaluation.loss_damage,
        loss_damage_interval=evaluation and evaluation.loss_damage_interval,
        population_loss=evaluation and evaluation.population.loss,
    )


def as_tensors(moments: Mapping[str, BatchMoments]) -> dict[str, dict[str, Tensor]]:
    """Population statistics as a checkpoint holds them: float64 on the CPU."""
    return {path: {"mean": m.mean.cpu(), "unbiased_var": m.unbiased_var.cpu()} for path, m in moments.items()}


def shippable_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The checkpoint's model under torch's keys, with the population's statistics in place of the running ones.

    Load it into the plain model with ``load_state_dict``. Tensors that do not change are those of the checkpoint.

    Raises: ValueError if the checkpoint holds no population statistics.
    """
    if checkpoint.population_statistics is None:
        raise ValueError(
            f"the checkpoint of step {checkpoint.step} holds no population statistics, only the running ones; "
            "set recompute_bn in the job's spec, or ship the running ones knowingly"
        )
    state = dict(checkpoint.model)
    for path, moments in checkpoint.population_statistics.items():
        for name, moment in (("running_mean", "mean"), ("running_var", "unbiased_var")):
            key = f"{path}.{name}" if path else name
            state[key] = moments[moment].to(state[key].dtype)
    return state


def doubts(checkpoint: Checkpoint) -> list[str]:
    """What speaks against shipping the running statistics in ``checkpoint.model``, in sentences; empty if nothing."""
    return list(_doubts(checkpoint))


def _doubts(checkpoint: Checkpoint) -> Iterator[str]:
    certificate = checkpoint.statistics
    if certificate is None:
        if any(key.endswith("running_mean") for key in checkpoint.model):
            yield "Nothing is known of the running statistics: they were not measured before the checkpoint was saved."
        return
    if certificate.measured_step != checkpoint.step:
        yield (
            f"The running statistics were last measured at step {certificate.measured_step}, and the weights are "
            f"those of step {checkpoint.step}."
        )
    if certificate.is_young:
        yield (
            f"{certificate.initial_weight:.1%} of the running statistics is still what they began with, after "
            f"{certificate.num_batches} batches."
        )
    interval = certificate.loss_damage_interval
    if interval is None:
        yield "What the running statistics cost was not measured: there was no evaluation."
    elif not _harmless(interval, certificate.population_loss):
        yield (
            f"The running statistics cost {certificate.loss_damage:+.3g} nats of validation loss against the "
            f"population's (95 % interval {interval.low:+.3g} to {interval.high:+.3g}), measured at step "
            f"{certificate.evaluated_step}."
        )
    if not all(value.isfinite().all() for key, value in checkpoint.model.items() if ".running_" in f".{key}"):
        yield "Some running statistics are not finite."


def _harmless(interval: Interval, population_loss: float | None) -> bool:
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return False
    return not loss_damage_colour(interval.low, interval.high, population_loss).harmful


def _num_batches(model: nn.Module) -> list[int]:
    counters = [layer.num_batches_tracked for layer in tracked_layers(model).values()]
    return torch.stack([torch.zeros((), dtype=torch.int64) if c is None else c.cpu() for c in counters]).tolist()
