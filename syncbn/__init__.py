"""Synchronized batch normalization for torch: exact over all ranks, on CPU (gloo) and CUDA (NCCL)."""

from syncbn.accumulation import accumulate_statistics
from syncbn.batchnorm import SyncBatchNorm
from syncbn.convert import convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.drift import LayerDrift, log_var_ratio, mean_shift, measure_drift, output_error, rank_disagreement
from syncbn.errors import ExchangeError, RanksDisagree, RanksMissing
from syncbn.estimators import Estimator
from syncbn.freezing import freeze, is_frozen, unfreeze
from syncbn.functional import sync_batch_norm
from syncbn.join import JoinableModel
from syncbn.moments import BatchMoments
from syncbn.naming import name_layers
from syncbn.population import apply_statistics, population_statistics, using_statistics
from syncbn.preflight import check_agreement

__all__ = [
    "BatchMoments",
    "Estimator",
    "ExchangeError",
    "JoinableModel",
    "LayerDrift",
    "RanksDisagree",
    "RanksMissing",
    "SyncBatchNorm",
    "accumulate_statistics",
    "apply_statistics",
    "check_agreement",
    "convert_sync_batchnorm",
    "freeze",
    "is_frozen",
    "log_var_ratio",
    "mean_shift",
    "measure_drift",
    "name_layers",
    "output_error",
    "population_statistics",
    "rank_disagreement",
    "revert_sync_batchnorm",
    "sync_batch_norm",
    "unfreeze",
    "using_statistics",
]

__version__ = "0.1.0"
