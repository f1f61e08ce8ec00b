"""What a runner would tell, made in one line."""

import math
from collections.abc import Sequence

from service.jobs import (
    BatchNormSample,
    Drift,
    Evaluation,
    IngestBatch,
    JobSpec,
    LayerDrift,
    LayerSample,
    RankBatch,
    RankStarted,
    Scores,
    StepMetrics,
    TelemetryEvent,
)

TIME = 1_700_000_000.25


def spec(name: str = "digits", num_workers: int = 2, max_steps: int = 100) -> JobSpec:
    return JobSpec(name=name, num_workers=num_workers, max_steps=max_steps)


def batch(events: Sequence[TelemetryEvent], rank: int = 0, first_seq: int = 0) -> IngestBatch:
    return IngestBatch(batches=(rank_batch(events, rank, first_seq),))


def rank_batch(events: Sequence[TelemetryEvent], rank: int = 0, first_seq: int = 0) -> RankBatch:
    return RankBatch(rank=rank, first_seq=first_seq, times=(TIME,) * len(events), events=tuple(events))


def step(number: int, loss: float = 1.0, step_s: float = 0.5) -> StepMetrics:
    return StepMetrics(step=number, epoch=number // 10, loss=loss, learning_rate=0.1, step_s=step_s)


def started(resumed_step: int = 0, total_steps: int = 100) -> RankStarted:
    return RankStarted(
        world_size=2,
        host="here",
        pid=1,
        device="cpu",
        resumed_step=resumed_step,
        total_steps=total_steps,
        steps_per_epoch=10,
        num_train_images=640,
        num_validation_images=64,
        num_classes=10,
        num_parameters=1000,
        torch_version="2",
        syncbn_version="0",
    )


def evaluation(step: int, loss: float = 0.5, accuracy: float = 0.75) -> Evaluation:
    return Evaluation(
        step=step,
        epoch=0,
        num_images=64,
        stored=Scores(loss=loss, accuracy=accuracy),
        population=Scores(loss=loss, accuracy=accuracy),
        loss_damage=0.0,
        loss_damage_se=math.nan,
        accuracy_damage=0.0,
        accuracy_damage_se=0.0,
    )


def drift(step: int, **mean_shifts: float) -> Drift:
    return Drift(step=step, num_population_images=640, layers=tuple(_layer(*item) for item in mean_shifts.items()))


def sample(step: int, **max_abs_z: float) -> BatchNormSample:
    return BatchNormSample(step=step, layers=tuple(_layer_sample(*item) for item in max_abs_z.items()))


def _layer_sample(name: str, max_abs_z: float) -> LayerSample:
    return LayerSample(
        layer=name,
        num_channels=4,
        num_images=16,
        positions_per_image=1,
        design_effect=1.0,
        mean_shift_noise=0.05,
        share_beyond_3=0.0,
        max_abs_z=max_abs_z,
        max_abs_z_channel=2,
        buffers_equal=True,
        num_dead=1,
        num_collapsed=0,
        num_exploding=0,
        num_muted=0,
        dead=(3,),
    )


def _layer(name: str, rms_mean_shift: float) -> LayerDrift:
    return LayerDrift(
        layer=name,
        num_channels=4,
        rms_mean_shift=rms_mean_shift,
        max_mean_shift=rms_mean_shift,
        max_mean_shift_channel=0,
        mean_abs_log_var_ratio=0.0,
        max_abs_log_var_ratio=0.0,
        output_error=math.inf,
        rank_disagreement=0.0,
    )
