import math

from service.jobs import Drift, DriftLimit, DriftMetric, LayerDrift, LimitAction
from service.training.limits import LimitWatch


def _drift(step: int, **shifts: float) -> Drift:
    layers = tuple(
        LayerDrift(
            layer=name.replace("_", "."),
            num_channels=1,
            rms_mean_shift=shift,
            max_mean_shift=2 * shift,
            max_mean_shift_channel=0,
            mean_abs_log_var_ratio=0.0,
            max_abs_log_var_ratio=0.0,
            output_error=0.0,
            rank_disagreement=0.0,
        )
        for name, shift in shifts.items()
    )
    return Drift(step=step, num_population_images=10, layers=layers)


def _told(watch: LimitWatch, drift: Drift) -> list[tuple[int, str]]:
    return [(event.limit, event.layer) for event in watch.exceeded(drift)]


def test_a_limit_speaks_once_for_each_layer_until_that_is_within_again() -> None:
    watch = LimitWatch([DriftLimit(above=0.1), DriftLimit(layers="deep.*", above=0.5)])
    assert _told(watch, _drift(1, first=0.1, deep_norm=0.05)) == []
    assert _told(watch, _drift(2, first=0.11, deep_norm=0.05)) == [(0, "first")]
    assert _told(watch, _drift(3, first=0.9, deep_norm=0.6)) == [(0, "deep.norm"), (1, "deep.norm")]
    assert _told(watch, _drift(4, first=0.05, deep_norm=0.2)) == []
    assert _told(watch, _drift(5, first=0.2, deep_norm=0.9)) == [(0, "first"), (1, "deep.norm")]


def test_what_it_tells_is_the_metric_it_was_given() -> None:
    watch = LimitWatch([DriftLimit(metric=DriftMetric.MAX_MEAN_SHIFT, above=0.3, action=LimitAction.PAUSE)])
    (event,) = watch.exceeded(_drift(7, norm=0.2))
    assert (event.step, event.metric, event.value, event.above, event.action) == (
        7,
        DriftMetric.MAX_MEAN_SHIFT,
        0.4,
        0.3,
        LimitAction.PAUSE,
    )


def test_new_statistics_are_asked_for_every_time() -> None:
    watch = LimitWatch([DriftLimit(above=0.1, action=LimitAction.RECOMPUTE)])
    assert watch.may_recompute
    assert not LimitWatch([DriftLimit(above=0.1)]).may_recompute
    assert [_told(watch, _drift(step, norm=0.2)) for step in (1, 2)] == [[(0, "norm")]] * 2


def test_what_is_no_number_is_beyond_any_limit() -> None:
    assert _told(LimitWatch([DriftLimit(above=1e30)]), _drift(1, norm=math.nan)) == [(0, "norm")]
