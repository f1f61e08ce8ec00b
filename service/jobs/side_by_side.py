"""Several jobs beside each other, as every reader gets them."""

from service.jobs.comparison import Comparison
from service.jobs.job import View
from service.jobs.report import JobReport


class ComparedGroup(View):
    """Jobs that share everything but the seed, by what sets them apart from the other groups.

    ``job_ids`` are the runs that count, in order of their seeds.
    """

    name: str
    job_ids: tuple[str, ...]


class LeftOut(View):
    """A job that does not count as a run of its group, and why."""

    job_id: str
    why: str


class SideBySide(View):
    """The reports of jobs, without their lists of evaluations, and what the groups say about each other over seeds."""

    reports: tuple[JobReport, ...]
    groups: tuple[ComparedGroup, ...]
    left_out: tuple[LeftOut, ...]
    comparisons: tuple[Comparison, ...]
    sentence: str
