"""Two groups of jobs against each other, over seeds, as every reader gets it."""

from enum import StrEnum

from service.jobs.job import View


class ComparedMetric(StrEnum):
    """What of a run is compared: the median of its last five evaluations, never the best one."""

    ACCURACY = "accuracy"
    """Validation accuracy with the stored statistics, those that are shipped."""
    LOSS = "loss"
    """Validation loss with the stored statistics, in nats."""
    POPULATION_ACCURACY = "population_accuracy"
    POPULATION_LOSS = "population_loss"


class ComparisonVerdict(StrEnum):
    """Which group did better, if that can be told."""

    FIRST_BETTER = "first_better"
    SECOND_BETTER = "second_better"
    UNDECIDED = "undecided"


class Comparison(View):
    """The mean of ``first`` minus the mean of ``second``, with interval and exact permutation test.

    ``level`` is the share of repetitions in which an interval such as ``low`` to ``high`` holds the true difference:
    95 % where the runs suffice. ``p`` is two-sided; ``adjusted_p`` is corrected for all comparisons made at once
    (Holm 1979) and decides. ``smallest_p`` is what so many runs can reach at best.
    """

    first: str
    second: str
    metric: ComparedMetric
    verdict: ComparisonVerdict
    sentence: str
    paired: bool
    """Whether the seeds match, so that each pair differs in nothing else."""
    num_first: int
    num_second: int
    mean_first: float | None = None
    mean_second: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    level: float | None = None
    p: float | None = None
    adjusted_p: float | None = None
    smallest_p: float | None = None
