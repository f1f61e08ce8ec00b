"""Synchronized batch normalization for torch: exact over all ranks, on CPU (gloo) and CUDA (NCCL)."""

from syncbn.batchnorm import SyncBatchNorm
from syncbn.convert import convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.drift import LayerDrift, log_var_ratio, mean_shift, measure_drift, output_error, rank_disagreement
from syncbn.functional import sync_batch_norm
from syncbn.moments import BatchMoments
from syncbn.population import population_statistics, using_statistics

__all__ = [
    "BatchMoments",
    "LayerDrift",
    "SyncBatchNorm",
    "convert_sync_batchnorm",
    "log_var_ratio",
    "mean_shift",
    "measure_drift",
    "output_error",
    "population_statistics",
    "rank_disagreement",
    "revert_sync_batchnorm",
    "sync_batch_norm",
    "using_statistics",
]

__version__ = "0.1.0"
