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

__all__ = [
    "Deviation",
    "Difference",
    "ImageMoments",
    "LayerDrift",
    "RankContrast",
    "batch_deviation",
    "best_momentum",
    "design_effect",
    "effective_batches",
    "effective_count",
    "half_life",
    "hellinger",
    "initial_weight",
    "jensen_shannon",
    "lag_bias",
    "lag_steps",
    "log_var_ratio",
    "log_var_standard_error",
    "mean_shift",
    "mean_standard_error",
    "measure_drift",
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
