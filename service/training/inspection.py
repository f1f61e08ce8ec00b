"""What a run does between two steps when it is time to look at the model, and what it then knows of it."""

from collections.abc import Iterator

from torch import Tensor, nn

from service.jobs import (
    Drift,
    Evaluation,
    JobSpec,
    LimitAction,
    LimitExceeded,
    LogLine,
    ModeFault,
    Phase,
    PhaseChanged,
    StatisticsCertificate,
    TelemetryEvent,
)
from service.training.checkpoint import Checkpoint
from service.training.evaluation import Examiner
from service.training.limits import LimitWatch
from service.training.meeting import said_by_rank_zero
from service.training.modes import ModeWatch
from service.training.momentum import replay_momenta
from service.training.population import Population
from service.training.shipping import as_tensors, certify_statistics
from syncbn import apply_statistics
from syncbn.history import StatisticsHistory


class Inspector:
    """Looks at one run's ``model``; all ranks look together.

    ``probe_images`` are the same on every rank; ``checkpoint`` is what the run goes on from.
    """

    def __init__(
        self, spec: JobSpec, model: nn.Module, examiner: Examiner, probe_images: Tensor, checkpoint: Checkpoint | None
    ) -> None:
        self.has_no_start = checkpoint is not None and checkpoint.has_no_start
        self.best = examiner.best
        if checkpoint:
            self.best.restore(checkpoint.best_step, checkpoint.best_losses)
        self._spec = spec
        self._model = model
        self._examiner = examiner
        self._modes = ModeWatch(model, probe_images)
        self._limits = LimitWatch(spec.drift_limits)
        self._population: tuple[int, Population] | None = None
        self._drift: Drift | None = None
        self._evaluation: Evaluation | None = None
        # Rank 0's alone: DDP overwrites the local statistics of the others, and synchronized ones are equal.
        keeps = examiner.context.leads and spec.diagnostics.replay_steps > 0
        self._history = StatisticsHistory(model, spec.diagnostics.replay_steps) if keeps else None

    def after_step(self) -> None:
        """Keep the running statistics of the step that was just taken. Call after each; no exchange."""
        if self._history:
            self._history.record()

    def look(
        self, step: int, epoch: int, *, evaluates: bool, measures_drift: bool, is_last: bool
    ) -> Iterator[TelemetryEvent]:
        """Judge the model, and act on the limits that its drift exceeds; what rank 0 finds is told.

        The last look also tells what other momenta would have given.
        All ranks take part, whatever they have to tell: who stays away makes the others wait.
        """
        leads = self._examiner.context.leads
        if leads:
            yield PhaseChanged(phase=Phase.VALIDATING)
        faults = [*self._modes.in_training(step), *(self._modes.in_evaluation(step) if evaluates else ())]
        if leads:
            yield from faults  # at once: where ranks hold unequal numbers of batches, such a layer ends the run here
        moved: list[ModeFault] = []
        with self._modes.during_evaluation(step, moved):
            population = self._measure_population(step)
            if evaluates:
                self._evaluation = self._examiner.evaluate(self._model, population, step, epoch)
            if measures_drift:
                self._measure_drift(population, step)
        evaluation = self._evaluation if evaluates else None
        drift = self._drift if measures_drift else None
        exceeded = self._follow_limits(drift, population, step) if drift else []
        if not leads:
            return
        if evaluation:
            yield evaluation
        if drift:
            yield drift
        yield from moved
        yield from exceeded
        if is_last and self._history:
            replay = replay_momenta(self._model, self._history, population.moments, self._spec.bn_momentum, step)
            if replay:
                yield replay
        yield LogLine(text=_sentence(step, evaluation, drift))

    def certify(self, step: int) -> tuple[StatisticsCertificate | None, dict[str, dict[str, Tensor]] | None]:
        """What a checkpoint of ``step`` carries: a certificate, on rank 0, and population statistics if it shall.

        For the latter they are measured here where they were not at this step; all ranks must call.
        """
        population = None
        if self._spec.recompute_bn:
            population = self._measure_population(step)
            if self._drift is None or self._drift.step != step:
                self._measure_drift(population, step)
        if not self._examiner.context.leads or self._drift is None:
            return None, None
        certificate = certify_statistics(self._model, self._drift, self._evaluation, recomputed=self._spec.recompute_bn)
        return certificate, as_tensors(population.moments) if population else None

    def _measure_population(self, step: int) -> Population:
        """Once a step."""
        if self._population is None or self._population[0] != step:
            self._population = step, self._examiner.population(self._model)
        return self._population[1]

    def _measure_drift(self, population: Population, step: int) -> None:
        self._drift = self._examiner.drift(self._model, population, step, has_no_start=self.has_no_start)

    def _follow_limits(self, drift: Drift, population: Population, step: int) -> list[LimitExceeded]:
        """What is exceeded; where a limit asks for it, all ranks take the population's statistics for their own."""
        exceeded = list(self._limits.exceeded(drift))
        if not self._limits.may_recompute:
            return exceeded
        wanted = any(event.action is LimitAction.RECOMPUTE for event in exceeded)
        # Under local normalization each rank holds its own statistics against the limits: rank 0 says.
        (recomputes,) = said_by_rank_zero([int(wanted)], self._examiner.context)
        if recomputes and _is_finite(population):
            apply_statistics(self._model, population.moments)
            if self._history:
                self._history.restart()
            self.has_no_start = True
            self._evaluation = None  # of statistics that are gone
            self._measure_drift(population, step)
        return exceeded


def _is_finite(population: Population) -> bool:
    """The same on every rank, as the population is."""
    moments = population.moments.values()
    return all(bool(m.mean.isfinite().all()) and bool(m.unbiased_var.isfinite().all()) for m in moments)


def _sentence(step: int, evaluation: Evaluation | None, drift: Drift | None) -> str:
    parts = []
    if evaluation:
        stored, population = evaluation.stored, evaluation.population
        parts.append(
            f"validation loss {stored.loss:.4g}, accuracy {stored.accuracy:.2%}; "
            f"with population statistics {population.loss:.4g}, {population.accuracy:.2%}"
        )
        if evaluation.data_shift and evaluation.data_shift.moved:
            parts.append(f"validation images are not like training images to layer {evaluation.data_shift.layer}")
    if drift and drift.layers:
        worst = max(drift.layers, key=lambda layer: layer.rms_mean_shift)
        parts.append(f"worst mean shift {worst.rms_mean_shift:.3g} sigma in layer {worst.layer}")
    return f"step {step}: " + "; ".join(parts)
