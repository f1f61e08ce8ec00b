"""What is said of the statistics in the newest checkpoint."""

import math
from typing import Any

import pytest

from service.jobs import CheckpointSaved, DriftColour, Interval, StatisticsCertificate
from service.reports.shipping import judge_checkpoint


def _saved(step: int = 500, **fields: Any) -> CheckpointSaved:
    values: dict[str, Any] = {
        "estimator": "pooled",
        "num_images": 1000,
        "recomputed": False,
        "worst_layer": "layers.0",
        "rms_mean_shift": 0.1,
        "initial_weight": 0.0,
        "lag_steps": 9.0,
        "num_batches": 500,
        "measured_step": 500,
        "evaluated_step": 500,
        "loss_damage": 0.001,
        "loss_damage_interval": Interval(low=-0.001, high=0.003),
    }
    certificate = None if fields.get("nothing") else StatisticsCertificate(**{**values, **fields})
    return CheckpointSaved(step=step, path="/x.pt", size_bytes=1, duration_s=1.0, statistics=certificate)


@pytest.mark.parametrize(
    ("saved", "colour", "words"),
    [
        (_saved(), DriftColour.GREEN, "nothing speaks against"),
        (_saved(recomputed=True, initial_weight=0.9), DriftColour.GREEN, "ship those"),
        (_saved(initial_weight=0.02), DriftColour.AMBER, "0.02 of its running statistics"),
        (_saved(initial_weight=math.nan), DriftColour.AMBER, "nan"),
        (_saved(loss_damage=0.1, loss_damage_interval=Interval(low=0.05, high=0.2)), DriftColour.AMBER, "+0.1 nats"),
        (_saved(loss_damage=0.003, loss_damage_interval=Interval(low=0.001, high=0.005)), DriftColour.GREEN, "+0.003"),
        (_saved(loss_damage=0.02, loss_damage_interval=Interval(low=0.001, high=0.05)), DriftColour.UNDECIDED, "few"),
        (
            _saved(loss_damage=0.02, loss_damage_interval=Interval(low=0.015, high=0.03), population_loss=2.0),
            DriftColour.GREEN,
            "+0.02",
        ),
        (_saved(loss_damage=None, loss_damage_interval=None), DriftColour.UNDECIDED, "not measured"),
        (_saved(loss_damage=math.nan), DriftColour.AMBER, "no finite validation loss"),
        (_saved(step=600), DriftColour.UNDECIDED, "weights are those of step 600"),
        (_saved(nothing=True), DriftColour.UNDECIDED, "nothing was measured"),
    ],
)
def test_a_checkpoint_ships_what_was_measured_at_its_step(
    saved: CheckpointSaved, colour: DriftColour, words: str
) -> None:
    verdict = judge_checkpoint([_saved(initial_weight=0.5), saved])
    assert verdict is not None
    assert (verdict.colour, verdict.step) == (colour, saved.step)
    assert words in verdict.sentence


def test_without_a_checkpoint_there_is_nothing_to_ship() -> None:
    assert judge_checkpoint([]) is None
