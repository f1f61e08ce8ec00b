"""Drift: how far statistics are from where they should be, and how much of that is chance."""

from syncbn.drift.layers import LayerDrift, log_var_ratio, mean_shift, measure_drift, output_error, rank_disagreement
from syncbn.drift.ranks import Difference, RankContrast
from syncbn.drift.sampling import (
    ImageMoments,
    design_effect,
    effective_count,
    log_var_standard_error,
    mean_standard_error,
    small_batch_var_bias,
)

__all__ = [
    "Difference",
    "ImageMoments",
    "LayerDrift",
    "RankContrast",
    "design_effect",
    "effective_count",
    "log_var_ratio",
    "log_var_standard_error",
    "mean_shift",
    "mean_standard_error",
    "measure_drift",
    "output_error",
    "rank_disagreement",
    "small_batch_var_bias",
]
