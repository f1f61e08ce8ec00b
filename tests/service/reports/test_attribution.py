"""The first layer to change: planted faults are placed, healthy runs name nothing."""

import math

import numpy as np
import pytest

from service.jobs import Drift, LayerDrift
from service.reports import LayerSeries, drift_series, first_to_change
from service.reports.attribution import robust_z


def _layers(seed: int, faults: dict[int, int], times: float = 30.0) -> list[LayerSeries]:
    """Four layers of 80 values about 5; layer ``depth`` is ``times`` as large from its step in ``faults`` on."""
    values = 5 + np.random.default_rng(seed).standard_normal((4, 80))
    for depth, step in faults.items():
        values[depth, step:] *= times
    return [
        LayerSeries(f"norm{d}", d, "output_error", tuple(range(80)), tuple(v.tolist())) for d, v in enumerate(values)
    ]


def test_the_earliest_change_comes_first_and_of_equals_the_shallower() -> None:
    found = first_to_change(_layers(0, {2: 50, 1: 50, 3: 45, 0: 52}))
    assert [(change.layer, change.step) for change in found.changes] == [
        ("norm3", 45),
        ("norm1", 50),
        ("norm2", 50),
        ("norm0", 52),
    ]
    assert "norm3 at step 45" in found.sentence
    assert "3 more layers followed" in found.sentence
    assert "need not be the cause" in found.sentence


def test_only_steps_between_the_two_are_looked_at() -> None:
    found = first_to_change(_layers(0, {1: 30, 2: 60}), first_step=55, last_step=70)
    assert [change.layer for change in found.changes] == ["norm2"]
    assert found.num_looks == 4 * 16


@pytest.mark.parametrize("kind", ["normal", "random walk"])
def test_healthy_layers_are_rarely_named(kind: str) -> None:
    """60 runs of 6 layers; 0 to 2.5 % were named of 200 runs of 18 series. Six of 60 would be 10 %."""
    named = 0
    for seed in range(60):
        noise = np.random.default_rng(seed).standard_normal((6, 60))
        values = 5 + (noise if kind == "normal" else 0.3 * noise.cumsum(axis=1))
        series = [LayerSeries(str(d), d, "z", tuple(range(60)), tuple(v.tolist())) for d, v in enumerate(values)]
        named += bool(first_to_change(series).changes)
    assert named < 6


def test_a_layer_is_named_once_by_its_first_metric_to_change() -> None:
    steps = tuple(range(40))
    early = LayerSeries("norm1", 0, "rms_mean_shift", steps, (0.0,) * 30 + (1.0,) * 10)
    late = LayerSeries("norm1", 0, "output_error", steps, (0.0,) * 35 + (math.nan,) * 5)
    found = first_to_change([late, early])
    assert [(change.metric, change.step) for change in found.changes] == [("rms_mean_shift", 30)]


def test_a_robust_z_is_the_distance_in_scaled_deviations() -> None:
    """Median 10 and deviation 1 of 9, 10, 10, 11 and so on; negative values have no logarithms. To 1e-12."""
    before = np.array([-1.0, 0.0, 1.0, 2.0, -2.0] * 4)
    assert robust_z(before, 8.0) == pytest.approx(8 / 1.4826, abs=1e-12)
    assert robust_z(before, math.nan) == math.inf
    assert robust_z(np.full(20, 0.1), 0.1 + 1e-17) == 0
    assert robust_z(np.zeros(20), 1e-6) == math.inf
    assert robust_z(np.array([1.0] * 19 + [math.nan]), 5.0) == 0


def test_positive_values_must_be_unexplained_by_their_logarithms_too() -> None:
    before = np.exp(np.random.default_rng(0).standard_normal(20))
    logs = np.log(before)
    expected = (math.log(40) - np.median(logs)) / 1.4826 / np.median(np.abs(logs - np.median(logs)))
    assert robust_z(before, 40.0) == pytest.approx(float(expected), abs=1e-12)


def test_too_few_values_are_undecided() -> None:
    series = [LayerSeries("norm1", 0, "z", tuple(range(20)), tuple(range(20)))]
    assert first_to_change(series).sentence.startswith("Undecided")
    assert first_to_change([]).changes == ()
    assert "No layer changed" in first_to_change(_layers(0, {})).sentence


def test_drift_samples_become_one_series_for_each_layer_and_metric() -> None:
    def layer(name: str, shift: float) -> LayerDrift:
        return LayerDrift(
            layer=name,
            num_channels=4,
            rms_mean_shift=shift,
            max_mean_shift=shift,
            max_mean_shift_channel=0,
            mean_abs_log_var_ratio=0.0,
            max_abs_log_var_ratio=0.0,
            output_error=shift,
            rank_disagreement=0.0,
        )

    samples = [
        Drift(step=10 * n, num_population_images=100, layers=(layer("norm1", 0.1), layer("norm2", n))) for n in (2, 1)
    ]
    series = drift_series(samples)
    assert len(series) == 8
    second = next(s for s in series if (s.layer, s.metric) == ("norm2", "rms_mean_shift"))
    assert (second.depth, second.steps, second.values) == (1, (10, 20), (1.0, 2.0))
