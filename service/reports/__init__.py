"""Verdicts from what a job recorded: pure functions over values; numpy and scipy only."""

from service.reports.attribution import LayerSeries, drift_series, first_to_change, sample_series
from service.reports.comparison import RunScore, compare, final_score
from service.reports.convergence import LossCourse, judge_convergence
from service.reports.decay import fit_decay
from service.reports.divergence import find_origin
from service.reports.drift import judge_drift
from service.reports.overfitting import judge_overfitting
from service.reports.record import JobRecord, SampledLayers
from service.reports.report import report_job
from service.reports.survival import kaplan_meier_median
from service.reports.target import reach_target

__all__ = [
    "JobRecord",
    "LayerSeries",
    "LossCourse",
    "RunScore",
    "SampledLayers",
    "compare",
    "drift_series",
    "final_score",
    "find_origin",
    "first_to_change",
    "fit_decay",
    "judge_convergence",
    "judge_drift",
    "judge_overfitting",
    "kaplan_meier_median",
    "reach_target",
    "report_job",
    "sample_series",
]
