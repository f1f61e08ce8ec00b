"""The facts of a run that went wrong in a known way: rank 1 sees brighter images, and the momentum is too small."""

import math

import numpy as np

from service.jobs import (
    BatchNormSample,
    Drift,
    Evaluation,
    Interval,
    LayerDrift,
    LayerSample,
    ModeFault,
    ModeFaultKind,
    MomentumReplay,
    RankFinding,
    RankQuantity,
    ReplayedMomentum,
    Scores,
    TelemetryEvent,
)
from tests.service.store.telling import started, step

LAYERS = tuple(f"blocks.{block}.norm{number}" for block in range(4) for number in (1, 2))


def course(num_steps: int = 400) -> list[TelemetryEvent]:
    """What rank 0 tells over the whole run."""
    noise = np.random.default_rng(0).standard_normal(num_steps + 1)
    told: list[TelemetryEvent] = [started(total_steps=num_steps)]
    for at in range(1, num_steps + 1):
        loss = 0.2 + 2.1 * math.exp(-at / 90) + 0.08 * float(noise[at])
        told.append(step(at, loss=max(loss, 0.01)))
        if at % 20 == 0:
            told.append(_sample(at))
        if at % 40 == 0:
            told += [_drift(at), _evaluation(at, num_steps)]
    told.append(_replay(num_steps))
    told.append(
        ModeFault(step=num_steps, kind=ModeFaultKind.FROZEN_IN_TRAINING, layer=LAYERS[2], detail="its counter stands")
    )
    return told


def _drift(at: int) -> Drift:
    layers = []
    for depth, layer in enumerate(LAYERS):
        shift = (0.05 + 0.06 * depth) * (1 + 0.4 * math.sin(at / 50 + depth))
        layers.append(
            LayerDrift(
                layer=layer,
                num_channels=16,
                rms_mean_shift=shift,
                max_mean_shift=3 * shift,
                max_mean_shift_channel=3,
                mean_abs_log_var_ratio=shift / 2,
                max_abs_log_var_ratio=shift,
                output_error=shift * 1.1,
                rank_disagreement=0.0,
                max_abs_z=9.0 * depth,
                z_threshold=4.5,
                expected_mean_shift=0.04,
                initial_weight=0.9**at,
                lag_steps=9.0,
            )
        )
    return Drift(step=at, num_population_images=1000, layers=tuple(layers))


def _evaluation(at: int, num_steps: int) -> Evaluation:
    population, damage = 0.25 + 1.8 * math.exp(-at / 110), 0.12 + 0.5 * math.exp(-at / 60)
    return Evaluation(
        step=at,
        epoch=at // 10,
        num_images=360,
        stored=Scores(loss=population + damage, accuracy=0.95 - 0.5 * math.exp(-at / 80)),
        population=Scores(loss=population, accuracy=0.97 - 0.4 * math.exp(-at / 80)),
        loss_damage=damage,
        loss_damage_se=0.02,
        accuracy_damage=0.02 + 0.1 * math.exp(-at / 80),
        accuracy_damage_se=0.005,
        loss_damage_interval=Interval(low=damage - 0.04, high=damage + 0.04),
        accuracy_damage_interval=Interval(low=0.01, high=0.03 + 0.1 * math.exp(-at / 80)),
        train=Scores(loss=population * 0.8, accuracy=0.98 - 0.4 * math.exp(-at / 80)),
    )


def _sample(at: int) -> BatchNormSample:
    layers = tuple(
        LayerSample(
            layer=layer,
            num_channels=16,
            num_images=16,
            positions_per_image=1,
            design_effect=1.0 + depth,
            mean_shift_noise=0.05,
            share_beyond_3=0.01,
            max_abs_z=2.0 + 0.1 * depth,
            max_abs_z_channel=2,
            buffers_equal=True,
            num_dead=2 if depth == 3 else 0,
            num_collapsed=0,
            num_exploding=0,
            num_muted=0,
            dead=(3, 7) if depth == 3 else (),
        )
        for depth, layer in enumerate(LAYERS)
    )
    findings = tuple(
        RankFinding(
            rank=rank,
            layer=LAYERS[0],
            channel=5,
            quantity=RankQuantity.MEAN if rank % 2 else RankQuantity.VARIANCE,
            z=9.7 if rank == 1 else 2.0 + 0.3 * rank,
            threshold=4.9,
            size=0.71 if rank == 1 else -0.1,
            num_samples=at // 20,
            min_size=0.1,
        )
        for rank in range(4)
    )
    return BatchNormSample(step=at, layers=layers, ranks=findings)


def _replay(at: int) -> MomentumReplay:
    candidates = tuple(
        ReplayedMomentum(
            momentum=momentum,
            rms_mean_shift=0.05 + 0.12 * math.log10(momentum / 0.1) ** 2,
            output_error=0.04 + 0.1 * math.log10(momentum / 0.1) ** 2,
        )
        for momentum in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    )
    return MomentumReplay(step=at, num_steps=200, used=0.01, best=0.1, candidates=candidates)
