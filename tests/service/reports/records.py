"""Records of jobs for tests of what is told of them."""

from datetime import UTC, datetime
from typing import Any

from service.jobs import (
    BatchNormSample,
    Drift,
    Evaluation,
    Job,
    JobSpec,
    JobState,
    LayerDrift,
    LayerSample,
    MetricSeries,
    RankFinding,
    RankQuantity,
    Scores,
)
from service.reports import JobRecord, SampledLayers

BIRTH = datetime(2026, 1, 2, tzinfo=UTC)


def spec_of(**fields: Any) -> JobSpec:
    """Two workers with 32 images each, synchronized, but for ``fields``."""
    return JobSpec.model_validate({"name": "report", "max_steps": 500, "num_workers": 2, **fields})


def record_of(spec: JobSpec | None = None, state: JobState = JobState.SUCCEEDED, **facts: Any) -> JobRecord:
    """A record of ``facts`` and, if there are none of it, a loss that rests at 0.5 for 100 steps."""
    job = Job(
        id="job_1",
        spec=spec or spec_of(),
        state=state,
        version=1,
        attempt=1,
        created_at=BIRTH,
        state_since=BIRTH,
        updated_at=BIRTH,
    )
    values = facts.pop("losses", (0.5,) * 100)
    losses = MetricSeries(
        name="loss", rank=None, steps=tuple(range(1, len(values) + 1)), values=values, num_points=len(values)
    )
    return JobRecord(job=job, num_attempts=1, losses=losses, **facts)


def evaluation_of(
    loss_damage: float = 0.0, *, error: float = 0.001, loss: float = 0.4, accuracy: float = 0.9, **fields: Any
) -> Evaluation:
    """``loss`` and ``accuracy`` are those with population statistics; the accuracy is not damaged."""
    values: dict[str, Any] = {
        "step": 500,
        "epoch": 10,
        "num_images": 1000,
        "stored": Scores(loss=loss + loss_damage, accuracy=accuracy),
        "population": Scores(loss=loss, accuracy=accuracy),
        "loss_damage": loss_damage,
        "loss_damage_se": error,
        "accuracy_damage": 0.0,
        "accuracy_damage_se": 0.001,
    }
    return Evaluation(**{**values, **fields})


def drift_of(*shifts: float, step: int = 500, **fields: Any) -> Drift:
    """One layer for each of ``shifts``, ``layers.0`` first; ``fields`` are set in all of them."""
    layers = [
        {
            "layer": f"layers.{place}",
            "num_channels": 8,
            "rms_mean_shift": shift,
            "max_mean_shift": 2 * shift,
            "max_mean_shift_channel": 0,
            "mean_abs_log_var_ratio": shift,
            "max_abs_log_var_ratio": shift,
            "output_error": shift,
            "rank_disagreement": 0.0,
            **fields,
        }
        for place, shift in enumerate(shifts)
    ]
    return Drift(step=step, num_population_images=1000, layers=tuple(LayerDrift(**layer) for layer in layers))


def layer_of(layer: str = "layers.0", **states: tuple[int, ...]) -> LayerSample:
    """A layer of 10 channels, of which those in ``states`` are in a bad one."""
    values: dict[str, Any] = {f"num_{state}": 0 for state in ("dead", "collapsed", "exploding", "muted")}
    values |= {f"num_{state}": len(channels) for state, channels in states.items()} | states
    return LayerSample(
        layer=layer,
        num_channels=10,
        num_images=64,
        positions_per_image=1,
        design_effect=1.0,
        mean_shift_noise=0.03,
        share_beyond_3=0.0,
        max_abs_z=2.0,
        max_abs_z_channel=0,
        buffers_equal=True,
        **values,
    )


def finding_of(rank: int, z: float, size: float, quantity: str = "mean", **fields: Any) -> RankFinding:
    """A finding in channel 3 of ``layers.0`` over 20 samples, with a threshold of 5 standard errors."""
    values: dict[str, Any] = {"layer": "layers.0", "channel": 3, "threshold": 5.0, "num_samples": 20, "min_size": 0.1}
    return RankFinding(rank=rank, z=z, size=size, quantity=RankQuantity(quantity), **{**values, **fields})


def sample_of(*ranks: RankFinding, step: int = 400, **fields: Any) -> BatchNormSample:
    """A sample of one healthy layer, but for ``fields``."""
    return BatchNormSample(**{"step": step, "layers": (layer_of(),), "ranks": ranks, **fields})


def sampled(*samples: BatchNormSample, attempt: int = 1) -> tuple[SampledLayers, ...]:
    """The samples of one attempt."""
    return tuple(SampledLayers(attempt, sample) for sample in samples)
