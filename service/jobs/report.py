"""The report on a job: two verdicts with the numbers behind them, as every reader gets it."""

from enum import StrEnum

from service.jobs.convergence import Convergence
from service.jobs.evaluation import Evaluation
from service.jobs.job import View
from service.jobs.layer_facts import LayerDrift
from service.jobs.spec import Normalization
from service.jobs.states import JobState


class DriftColour(StrEnum):
    """Whether the stored statistics may be shipped."""

    GREEN = "green"
    AMBER = "amber"
    RED = "red"
    UNDECIDED = "undecided"


class DriftVerdict(View):
    """Damage decides ``colour``, drift explains it.

    ``loss_damage`` and ``accuracy_damage`` are what the stored statistics cost against population statistics
    on the same weights and images, with 95 % intervals; positive is worse.
    """

    colour: DriftColour
    sentence: str
    loss_damage: float | None = None
    loss_damage_low: float | None = None
    loss_damage_high: float | None = None
    accuracy_damage: float | None = None
    accuracy_damage_low: float | None = None
    accuracy_damage_high: float | None = None
    worst_layer: LayerDrift | None = None
    max_rank_disagreement: float | None = None
    advice: tuple[str, ...] = ()


class JobReport(View):
    """Everything a person needs to judge a job on one page. ``complete`` once the job is terminal."""

    job_id: str
    name: str
    state: JobState
    normalization: Normalization
    complete: bool
    num_steps: int
    training_s: float | None
    num_attempts: int
    convergence: Convergence
    drift: DriftVerdict
    last_evaluation: Evaluation | None
    evaluations: tuple[Evaluation, ...]
