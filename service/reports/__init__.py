"""Verdicts from what a job recorded: pure functions over values; numpy and scipy only."""

from service.reports.convergence import judge_convergence
from service.reports.drift import judge_drift
from service.reports.report import report_job

__all__ = ["judge_convergence", "judge_drift", "report_job"]
