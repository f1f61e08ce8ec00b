import hashlib
import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn
from service.jobs import (
    CheckpointSaved,
    Evaluation,
    Interval,
    JobSpec,
    StatisticsCertificate,
    StepMetrics,
    TelemetryEvent,
)
from service.training import ship
from service.training.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from service.training.dataset import load_dataset
from service.training.loop import train
from service.training.models import build_model
from service.training.shipping import doubts, shippable_state
from tests.ranks import run_ranks
from tests.service.training.runs import assert_equal, last_checkpoint, losses, of, own_context, tiny_spec

SOUND = StatisticsCertificate(
    estimator="pooled",
    num_images=48,
    recomputed=False,
    worst_layer="norm1",
    rms_mean_shift=0.01,
    initial_weight=0.001,
    lag_steps=9.0,
    num_batches=70,
    measured_step=7,
    evaluated_step=7,
    loss_damage=0.001,
    loss_damage_interval=Interval(low=0.001, high=0.012),  # certain, and too little to matter
)


def _train(spec: JobSpec, storage: Path, until: int | None = None) -> list[TelemetryEvent]:
    """With ``until``, leave as soon as that step has been told."""
    events = train(spec, own_context(storage))
    return list(itertools.takewhile(lambda e: not (isinstance(e, StepMetrics) and e.step == until), events))


def _checkpoint(statistics: StatisticsCertificate | None = SOUND) -> Checkpoint:
    model = {"norm1.running_mean": torch.tensor([1.0, 2.0]), "norm1.running_var": torch.tensor([3.0, 4.0])}
    return Checkpoint(7, "f", model, {}, torch.zeros(1, 1, dtype=torch.uint8), statistics=statistics)


def test_a_run_that_recomputes_saves_both_and_goes_on_as_one_that_does_not(tmp_path: Path) -> None:
    cadence = {"evaluate_every_steps": 7, "checkpoint_every_steps": 5}
    spec = tiny_spec(tmp_path, normalization="local", recompute_bn=True, cadence=cadence)
    run_ranks(2, _train, spec, tmp_path / "broken", 7)
    (events, _) = run_ranks(2, _train, spec, tmp_path / "broken")
    plain = spec.model_copy(update={"recompute_bn": False})
    straight, _ = run_ranks(2, _train, plain, tmp_path / "plain")
    assert losses(events) == {step: loss for step, loss in losses(straight).items() if step > 5}
    recomputed = last_checkpoint(tmp_path / "broken")
    assert_equal(recomputed, last_checkpoint(tmp_path / "plain"))

    saved = of(CheckpointSaved, events)[-1].statistics
    assert saved is not None
    assert saved == recomputed.statistics
    assert (saved.recomputed, saved.num_images, saved.measured_step, saved.evaluated_step) == (True, 48, 14, 14)
    assert saved.num_batches == 14
    assert saved.initial_weight == pytest.approx(0.9**14)
    evaluation = of(Evaluation, events)[-1]
    assert (saved.loss_damage, saved.population_loss) == (evaluation.loss_damage, evaluation.population.loss)
    # The population once more, by the library on one process, for the weights that were saved.
    dataset = load_dataset(spec.data)
    model = build_model(spec.model, dataset.sample_shape, dataset.num_classes, spec.bn_momentum)
    model.load_state_dict(recomputed.model)
    expected = syncbn.population_statistics(model, [dataset.train_images])
    model.load_state_dict(shippable_state(recomputed))
    for path, moments in expected.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, _BatchNorm)
        torch.testing.assert_close(layer.running_mean, moments.mean.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.running_var, moments.unbiased_var.float(), rtol=1e-5, atol=1e-6)


def test_a_checkpoint_between_two_looks_says_when_its_statistics_were_measured(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, num_workers=1, batch_size_per_worker=8)  # looks at 6 and 12, saves at 5 and 10
    first, second, last = (event.statistics for event in of(CheckpointSaved, list(train(spec, own_context(tmp_path)))))
    assert first is None
    assert second is not None
    assert last is not None
    assert (second.measured_step, last.measured_step) == (6, 14)
    older = read_checkpoint(tmp_path / "checkpoints" / "step-00000010.pt")
    assert any("measured at step 6, and the weights are those of step 10" in doubt for doubt in doubts(older))
    with pytest.raises(ValueError, match="set recompute_bn in the job's spec"):
        shippable_state(older)


@pytest.mark.parametrize(
    ("statistics", "doubt"),
    [
        (None, "they were not measured"),
        (SOUND.model_copy(update={"measured_step": 5}), "last measured at step 5"),
        (SOUND.model_copy(update={"initial_weight": 0.6}), "60.0% of the running statistics is still"),
        (SOUND.model_copy(update={"loss_damage_interval": Interval(low=0.01, high=0.02)}), r"\+0.001 nats"),
        (SOUND.model_copy(update={"loss_damage_interval": Interval(low=math.nan, high=math.nan)}), "nan"),
        (SOUND.model_copy(update={"loss_damage_interval": None}), "there was no evaluation"),
    ],
)
def test_statistics_in_doubt_are_not_shipped_unless_someone_insists(
    tmp_path: Path, statistics: StatisticsCertificate | None, doubt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, weights = write_checkpoint(tmp_path, _checkpoint(statistics)), tmp_path / "out" / "weights.pt"
    assert ship.main([str(path), "-o", str(weights)]) == 3
    said = capsys.readouterr().err
    assert "step-00000007.pt is not shipped." in said
    assert "or ship with --anyway" in said
    assert not weights.exists()
    assert ship.main([str(path), "-o", str(weights), "--anyway"]) == 0
    (told,) = json.loads((tmp_path / "out" / "weights.pt.json").read_text())["doubts"]
    assert told in said
    assert re.search(doubt, told)


def test_what_is_shipped_is_a_plain_state_dict_with_its_certificate(tmp_path: Path) -> None:
    population = {
        "norm1": {"mean": torch.tensor([5.0, 6.0]).double(), "unbiased_var": torch.tensor([7.0, 8.0]).double()}
    }
    for name, checkpoint, expected in (
        ("running", _checkpoint(), [1.0, 2.0]),
        ("population", replace(_checkpoint(None), population_statistics=population), [5.0, 6.0]),
    ):
        weights = tmp_path / name / "weights.pt"
        assert ship.main([str(write_checkpoint(tmp_path, checkpoint)), "-o", str(weights)]) == 0
        state = torch.load(weights, weights_only=True)
        assert state["norm1.running_mean"].tolist() == expected
        assert state["norm1.running_var"].dtype == torch.float32
        beside = json.loads(weights.with_name("weights.pt.json").read_text())
        assert (beside["step"], beside["statistics"], beside["doubts"]) == (7, name, [])
        assert beside["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_a_damaged_checkpoint_is_not_shipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_checkpoint(tmp_path, _checkpoint())
    path.write_bytes(path.read_bytes()[:-1])
    assert ship.main([str(path), "-o", str(tmp_path / "weights.pt")]) == 2
    assert "it was cut off" in capsys.readouterr().err
