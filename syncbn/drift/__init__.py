"""Drift: how far statistics are from where they should be, and how much of that is chance."""

from syncbn.drift.distances import (
    hellinger,
    jensen_shannon,
    log_var_ratio,
    mean_shift,
    output_error,
    symmetric_kl,
    wasserstein,
)
from syncbn.drift.domain import LayerShift, first_moved, image_moments, measure_shift
from syncbn.drift.layers import LayerDrift, measure_drift, rank_disagreement
from syncbn.drift.moving_average import (
    best_momentum,
    effective_batches,
    half_life,
    initial_weight,
    lag_bias,
    lag_steps,
    noise,
    smallest_momentum,
)
from syncbn.drift.ranks import Difference, RankContrast
from syncbn.drift.sampling import (
    ImageMoments,
    design_effect,
    effective_count,
    log_var_standard_error,
    mean_standard_error,
    small_batch_var_bias,
)
from syncbn.drift.significance import (
    Deviation,
    batch_deviation,
    normal_equivalent,
    population_deviation,
    threshold,
    two_sided_p,
)
from syncbn.drift.trend import Trend, fit_trend

__all__ = [
    "Deviation",
    "Difference",
    "ImageMoments",
    "LayerDrift",
    "LayerShift",
    "RankContrast",
    "Trend",
    "batch_deviation",
    "best_momentum",
    "design_effect",
    "effective_batches",
    "effective_count",
    "first_moved",
    "fit_trend",
    "half_life",
    "hellinger",
    "image_moments",
    "initial_weight",
    "jensen_shannon",
    "lag_bias",
    "lag_steps",
    "log_var_ratio",
    "log_var_standard_error",
    "mean_shift",
    "mean_standard_error",
    "measure_drift",
    "measure_shift",
    "noise",
    "normal_equivalent",
    "output_error",
    "population_deviation",
    "rank_disagreement",
    "small_batch_var_bias",
    "smallest_momentum",
    "symmetric_kl",
    "threshold",
    "two_sided_p",
    "wasserstein",
]
