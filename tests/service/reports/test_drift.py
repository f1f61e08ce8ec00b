"""Drift verdicts as a table, the words they come with, and numbers of every ugliness."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.jobs import Drift, DriftColour, DriftVerdict, Evaluation, JobSpec, LayerDrift, Scores
from service.reports import judge_drift


def _evaluation(
    loss: tuple[float, float] = (0.0, 0.001),
    accuracy: tuple[float, float] = (0.0, 0.001),
    population: tuple[float, float] = (0.4, 0.9),
    **fields: Any,
) -> Evaluation:
    scores = Scores(loss=population[0] + loss[0], accuracy=population[1] - accuracy[0])
    values: dict[str, Any] = {
        "step": 500,
        "epoch": 10,
        "num_images": 1000,
        "stored": scores,
        "population": Scores(loss=population[0], accuracy=population[1]),
        "loss_damage": loss[0],
        "loss_damage_se": loss[1],
        "accuracy_damage": accuracy[0],
        "accuracy_damage_se": accuracy[1],
    }
    return Evaluation(**{**values, **fields})


def _drift(*shifts: float, disagreement: float = 0.0, step: int = 500) -> Drift:
    layers = [
        LayerDrift(
            layer=f"layers.{i}",
            num_channels=8,
            rms_mean_shift=shift,
            max_mean_shift=2 * shift,
            max_mean_shift_channel=0,
            mean_abs_log_var_ratio=shift,
            max_abs_log_var_ratio=shift,
            output_error=shift,
            rank_disagreement=disagreement,
        )
        for i, shift in enumerate(shifts)
    ]
    return Drift(step=step, num_population_images=1000, layers=tuple(layers))


def _spec(**fields: Any) -> JobSpec:
    return JobSpec.model_validate({"name": "drift", "epochs": 1, "num_workers": 2, **fields})


@pytest.mark.parametrize(
    ("loss", "accuracy", "colour"),
    [
        ((0.000, 0.001), (0.0, 0.001), DriftColour.GREEN),
        ((0.003, 0.0001), (0.0, 0.001), DriftColour.GREEN),  # shown, but under 0.005 nats
        ((0.012, 0.001), (0.0, 0.001), DriftColour.AMBER),
        ((0.030, 0.001), (0.0, 0.001), DriftColour.RED),  # all of it above 5 % of half a nat, 0.025
        ((0.026, 0.001), (0.0, 0.001), DriftColour.AMBER),  # interval begins at 0.024
        ((0.018, 0.008), (0.0, 0.001), DriftColour.UNDECIDED),  # interval 0.002 to 0.034: no matter, or red
        ((0.000, 0.020), (0.0, 0.001), DriftColour.UNDECIDED),
        ((0.000, 0.012), (0.0, 0.001), DriftColour.GREEN),  # interval ends at 0.0235
        ((-0.03, 0.005), (0.0, 0.001), DriftColour.GREEN),  # stored does better
        ((0.000, 0.001), (0.004, 0.001), DriftColour.AMBER),  # accuracy certainly 0.2 points worse
        ((0.000, 0.001), (0.002, 0.0009), DriftColour.GREEN),  # by 0.02 points
        ((0.000, 0.001), (0.010, 0.002), DriftColour.RED),  # by 0.6 points
        ((0.000, 0.001), (0.010, 0.006), DriftColour.GREEN),  # accuracy not shown, loss tells
        ((0.000, 0.020), (0.010, 0.002), DriftColour.RED),  # accuracy tells where the loss does not
    ],
)
def test_measured_damage_decides_the_colour(
    loss: tuple[float, float], accuracy: tuple[float, float], colour: DriftColour
) -> None:
    assert judge_drift([_evaluation(loss, accuracy)], []).colour is colour


def test_the_interval_is_the_mean_and_1_96_standard_errors() -> None:
    verdict = judge_drift([_evaluation((0.02, 0.003), (0.01, 0.002))], [])
    loss = (verdict.loss_damage, verdict.loss_damage_low, verdict.loss_damage_high)
    assert loss == pytest.approx((0.02, 0.02 - 1.96 * 0.003, 0.02 + 1.96 * 0.003), abs=1e-6)
    accuracy = (verdict.accuracy_damage, verdict.accuracy_damage_low, verdict.accuracy_damage_high)
    assert accuracy == pytest.approx((0.01, 0.01 - 1.96 * 0.002, 0.01 + 1.96 * 0.002), abs=1e-6)


def test_five_percent_of_next_to_nothing_is_no_harm() -> None:
    assert judge_drift([_evaluation((0.0008, 0.0001), population=(0.004, 1.0))], []).colour is DriftColour.GREEN


def test_the_last_step_counts_wherever_it_stands() -> None:
    bad, good = _evaluation((0.5, 0.01), step=10), _evaluation(step=20)
    assert judge_drift([good, bad], []).colour is DriftColour.GREEN
    assert judge_drift([good, bad.model_copy(update={"step": 30})], []).colour is DriftColour.RED


def test_of_two_evaluations_at_one_step_the_later_counts() -> None:
    first, second = _evaluation((0.5, 0.01)), _evaluation()
    assert judge_drift([first, second], []).colour is DriftColour.GREEN


def test_without_an_evaluation_nothing_is_decided() -> None:
    verdict = judge_drift([], [_drift(0.9)])
    assert verdict.colour is DriftColour.UNDECIDED
    assert "no evaluation" in verdict.sentence
    assert verdict.worst_layer is not None


def test_large_drift_without_damage_stays_green() -> None:
    verdict = judge_drift([_evaluation()], [_drift(0.5, 0.9, 0.1)], _spec())
    assert verdict.colour is DriftColour.GREEN
    assert verdict.worst_layer is not None
    assert verdict.worst_layer.layer == "layers.1"


def test_stored_statistics_that_do_better_are_said_to() -> None:
    assert "even better" in judge_drift([_evaluation((-0.03, 0.005))], []).sentence


def test_a_network_poor_under_both_statistics_is_not_called_healthy() -> None:
    spec = _spec(normalization="local", num_workers=8, batch_size_per_worker=2)
    evaluation = _evaluation((0.0, 0.005), population=(1.7, 0.37))
    verdict = judge_drift([evaluation], [_drift(0.02)], spec, num_classes=10)
    assert verdict.colour is DriftColour.GREEN
    assert "The network itself is poor" in verdict.sentence
    assert "not stale statistics" in verdict.sentence
    assert "2 images that share" in verdict.sentence


def test_a_poor_network_with_a_large_batch_is_not_blamed_on_the_batch() -> None:
    verdict = judge_drift([_evaluation(population=(2.0, 0.3))], [], _spec(batch_size_per_worker=64), num_classes=10)
    assert "poor" in verdict.sentence
    assert "share" not in verdict.sentence


def test_a_good_network_is_not_called_poor() -> None:
    assert "poor" not in judge_drift([_evaluation()], [], _spec(), num_classes=10).sentence


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_stored_statistics_without_a_finite_loss_are_red(bad: float) -> None:
    broken = Scores(loss=bad, accuracy=0.1)
    evaluation = _evaluation((bad, math.nan), stored=broken)
    assert judge_drift([evaluation], []).colour is DriftColour.RED
    both = judge_drift([evaluation.model_copy(update={"population": broken})], [])
    assert both.colour is DriftColour.RED
    assert "the weights are broken" in both.sentence


def test_an_interval_that_is_no_number_is_undecided() -> None:
    verdict = judge_drift([_evaluation((0.0, math.nan))], [])
    assert verdict.colour is DriftColour.UNDECIDED
    assert "not finite" in verdict.sentence
    assert verdict.loss_damage_low is None


def test_a_layer_whose_shift_is_no_number_is_the_worst() -> None:
    verdict = judge_drift([_evaluation()], [_drift(3.0, math.nan, 5.0)], _spec())
    assert verdict.worst_layer is not None
    assert verdict.worst_layer.layer == "layers.1"


_ANY = st.floats()
_SCORES = st.builds(Scores, loss=_ANY, accuracy=_ANY)
_EVALUATIONS = st.lists(
    st.builds(
        Evaluation,
        step=st.integers(0, 10**6),
        epoch=st.just(1),
        num_images=st.integers(0, 10**6),
        stored=_SCORES,
        population=_SCORES,
        loss_damage=_ANY,
        loss_damage_se=_ANY,
        accuracy_damage=_ANY,
        accuracy_damage_se=_ANY,
    ),
    max_size=3,
)
_SAMPLES = st.lists(
    st.builds(_drift, _ANY, _ANY, disagreement=_ANY, step=st.integers(0, 10**6)) | st.builds(_drift), max_size=3
)
_SPECS = st.builds(
    _spec,
    normalization=st.sampled_from(["sync", "local"]),
    num_workers=st.integers(1, 64),
    batch_size_per_worker=st.integers(2, 64),
    bn_momentum=st.floats(0, 1, exclude_min=True),
)


@given(_EVALUATIONS, _SAMPLES, st.none() | _SPECS, st.none() | st.integers(1, 1000))
def test_any_numbers_get_a_verdict(
    evaluations: list[Evaluation], drift: list[Drift], spec: JobSpec | None, num_classes: int | None
) -> None:
    verdict = judge_drift(evaluations, drift, spec, num_classes=num_classes)
    assert verdict.colour in DriftColour
    assert verdict.sentence
    assert DriftVerdict.model_validate_json(verdict.model_dump_json()).colour is verdict.colour
