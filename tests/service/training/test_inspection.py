from pathlib import Path
from typing import Any

import pytest

from service.jobs import (
    BatchNormSample,
    CheckpointSaved,
    Drift,
    Evaluation,
    JobSpec,
    LimitExceeded,
    ModeFault,
    MomentumReplay,
    TelemetryEvent,
)
from service.training.loop import train
from tests.ranks import run_ranks
from tests.service.training.runs import assert_equal, last_checkpoint, losses, of, own_context, tiny_spec


def _train(spec: JobSpec, storage: Path) -> list[TelemetryEvent]:
    return list(train(spec, own_context(storage)))


def test_all_diagnostics_together_change_no_bit_of_the_training(tmp_path: Path) -> None:
    quiet = tiny_spec(tmp_path, diagnostics={"sample_every_steps": None, "replay_steps": 0})
    limits = [{"above": 0.0}, {"layers": "norm2", "above": 0.0, "action": "alert"}]
    cadence = {"evaluate_every_steps": 3, "drift_every_steps": 3, "checkpoint_every_steps": 5}
    watched = tiny_spec(
        tmp_path,
        diagnostics={"sample_every_steps": 2, "replay_steps": 8},
        recompute_bn=True,
        drift_limits=limits,
        cadence=cadence,
    )
    plain, _ = run_ranks(2, _train, quiet, tmp_path / "quiet")
    told, other = run_ranks(2, _train, watched, tmp_path / "watched")
    assert losses(told) == losses(plain)
    assert_equal(last_checkpoint(tmp_path / "watched"), last_checkpoint(tmp_path / "quiet"))

    kinds: list[type[Any]] = [BatchNormSample, MomentumReplay, LimitExceeded, ModeFault]
    assert [of(kind, plain) for kind in kinds] == [of(kind, other) for kind in kinds] == [[], [], [], []]
    assert of(ModeFault, told) == []
    assert [sample.step for sample in of(BatchNormSample, told)] == [2, 4, 6, 8, 10, 12, 14]
    sample = of(BatchNormSample, told)[-1]
    assert [(layer.layer, layer.num_images, layer.buffers_equal) for layer in sample.layers] == [
        ("norm1", 8, True),
        ("norm2", 8, True),
    ]
    # Each limit once for each layer: drift never comes back to 0.
    exceeded = [(event.step, event.limit, event.layer) for event in of(LimitExceeded, told)]
    assert exceeded == [(3, 0, "norm1"), (3, 0, "norm2"), (3, 1, "norm2")]

    (replay,) = of(MomentumReplay, told)
    assert (replay.step, replay.num_steps, replay.used) == (14, 8, 0.1)
    used = next(candidate for candidate in replay.candidates if candidate.momentum == 0.1)
    worst = max(layer.rms_mean_shift for layer in of(Drift, told)[-1].layers)
    assert used.rms_mean_shift == pytest.approx(worst, rel=1e-5)  # float32 buffers, replayed from eight steps
    best = min(replay.candidates, key=lambda candidate: candidate.output_error)
    assert replay.best == best.momentum


def test_statistics_beyond_a_limit_are_replaced_on_all_ranks_and_the_weights_go_on(tmp_path: Path) -> None:
    common = {"max_steps": 6, "cadence": {"drift_every_steps": 3}}
    limited = tiny_spec(tmp_path, drift_limits=[{"above": 1e-9, "action": "recompute"}], **common)
    events, _ = run_ranks(2, _train, limited, tmp_path / "limited")
    plain, _ = run_ranks(2, _train, tiny_spec(tmp_path, **common), tmp_path / "plain")
    # Training normalizes by batches, so that statistics may be replaced without a change of any loss.
    assert losses(events) == losses(plain)
    assert {event.step for event in of(LimitExceeded, events)} == {3, 6}
    first, second = of(Drift, events)
    assert all(layer.initial_weight == pytest.approx(0.9**3) for layer in first.layers)
    assert all(layer.initial_weight == 0.0 for layer in second.layers)
    assert all(layer.rank_disagreement == 0.0 for layer in second.layers)

    certificate = of(CheckpointSaved, events)[-1].statistics
    assert certificate is not None
    assert certificate.rms_mean_shift < 1e-6  # replaced at this very step; float32 buffers of float64 statistics
    assert certificate.loss_damage is None
    assert of(Evaluation, events)[-1].loss_damage != 0.0
    saved = last_checkpoint(tmp_path / "limited")
    assert saved.has_no_start
    assert certificate.initial_weight == 0.0
