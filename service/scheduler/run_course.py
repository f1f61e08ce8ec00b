"""How one job's run goes, as far as its rules ask for it, put together from what it tells."""

from collections.abc import Iterable

from service.jobs import (
    Evaluation,
    JobEvent,
    JobSpec,
    LimitAction,
    LimitExceeded,
    MetricSeries,
    NonFinite,
    RankStarted,
    StopRule,
    Topic,
)
from service.reports import LossCourse, reach_target
from service.scheduler.rules import LOSS_RULES, Ruling, may_pause, rule


class RunCourse:
    """The course of a run over all its attempts, in constant memory save for its evaluations.

    A new attempt goes back to the step from which it resumes: what earlier ones told of later steps counts no more,
    and neither do the limits that they exceeded, which the new one tells again when it finds them exceeded.
    """

    def __init__(self, spec: JobSpec) -> None:
        self.last_seq = 0
        """Of the last event that was taken."""
        self.last_step = 0
        """Up to which the losses were taken; the next ones are those after it."""
        self._spec = spec
        self._attempt = 0
        self._losses: LossCourse | None = None
        self._losses_are_older = False
        self._evaluations: list[Evaluation] = []
        self._non_finite: list[tuple[int, NonFinite]] = []
        self._exceeded: list[LimitExceeded] = []

    @property
    def topics(self) -> tuple[Topic, ...]:
        """The events to be taken, in order and all of them."""
        wanted = {
            Topic.RANK_STARTED: True,
            Topic.EVALUATION: StopRule.TARGET in self._spec.stop_when,
            Topic.NON_FINITE: StopRule.DIVERGED in self._spec.stop_when,
            Topic.LIMIT_EXCEEDED: may_pause(self._spec),
        }
        return tuple(topic for topic, is_wanted in wanted.items() if is_wanted)

    @property
    def wants_losses(self) -> bool:
        """Whether a rule is about the training loss."""
        return bool(LOSS_RULES & set(self._spec.stop_when))

    def take_events(self, events: Iterable[JobEvent]) -> None:
        """Take the next events after ``last_seq``."""
        for event in events:
            self.last_seq = event.seq
            self._take_event(event, event.attempt or 0)

    def take_losses(self, losses: MetricSeries, last_step: int) -> None:
        """Take the losses of the steps after ``last_step`` so far and up to the new one, the mean over all ranks."""
        assert self._losses is not None  # a rank that takes steps has told before that it began
        if losses.steps:
            self._losses.add(losses.steps, losses.values)
            self._losses_are_older = False
        self.last_step = last_step

    def ruling(self) -> Ruling | None:
        """What follows by now, if anything."""
        convergence = target = None
        if self.wants_losses and self._losses is not None and not self._losses_are_older:
            # Ranks that are ahead may have told what the others have not: who began it is known when all have.
            convergence = self._losses.lasting_verdict(
                (rank, fact) for rank, fact in self._non_finite if fact.step <= self.last_step
            )
        if self._spec.target is not None and self._evaluations:
            target = reach_target(self._evaluations, self._spec.target, images_per_step=self._spec.global_batch_size)
        return rule(self._spec.stop_when, convergence, target, self._exceeded)

    def _take_event(self, event: JobEvent, attempt: int) -> None:
        match event.type:
            case Topic.RANK_STARTED if attempt > self._attempt:
                self._attempt = attempt
                self._go_back(RankStarted.model_validate(event.body))
            case Topic.EVALUATION:
                self._evaluations.append(Evaluation.model_validate(event.body))
            case Topic.NON_FINITE:
                self._non_finite.append((event.rank or 0, NonFinite.model_validate(event.body)))
            case Topic.LIMIT_EXCEEDED if attempt == self._attempt:
                exceeded = LimitExceeded.model_validate(event.body)
                if exceeded.action is LimitAction.PAUSE:
                    self._exceeded.append(exceeded)

    def _go_back(self, started: RankStarted) -> None:
        step = started.resumed_step
        if self._losses is None:
            warmup = self._spec.schedule.warmup_steps
            self._losses = LossCourse(started.num_classes, warmup_steps=warmup, total_steps=started.total_steps)
        self._losses_are_older = self._losses_are_older or self.last_step > step
        self.last_step = min(self.last_step, step)
        self._evaluations = [evaluation for evaluation in self._evaluations if evaluation.step <= step]
        self._non_finite = [(rank, fact) for rank, fact in self._non_finite if fact.step <= step]
        self._exceeded = []
