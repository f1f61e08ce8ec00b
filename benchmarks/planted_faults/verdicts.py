"""Whether the report of a job says what was planted: the right cause and, where there is one, layer and rank."""

import re
from dataclasses import dataclass

from service.jobs import FindingKind, JobFinding, JobReport, Severity

_ALARMING = (Severity.AMBER, Severity.RED)


@dataclass(frozen=True)
class Expected:
    """A finding of one of ``kinds`` that is at least amber; ``layer``, ``rank`` and ``step`` must be named if given.

    Where ``rank`` is given, no other may be accused of the same. ``channels`` are all that the layer's entry in the
    report names; few channels are but a note, which is then enough. ``failure`` is a pattern for the words of the
    error with which a rank ends.
    """

    kinds: tuple[FindingKind, ...] = ()
    layer: str | None = None
    rank: int | None = None
    step: int | None = None
    channels: tuple[int, ...] | None = None
    tensor: bool = False
    """Whether the first tensor that is not finite must be named, if the loss ever was not."""
    failure: str | None = None

    def is_met(self, report: JobReport, failures: tuple[str, ...]) -> bool:
        """Whether the verdict is right."""
        if self.failure is not None and not any(re.search(self.failure, words) for words in failures):
            return False
        if self.tensor and report.convergence.first_non_finite_step is not None:
            origin = report.convergence.non_finite
            if origin is None or not origin.tensor:
                return False
        found = self._of_kind(report)
        if self.kinds and not any(self._fits(finding) for finding in found):
            return False
        if self.rank is not None and any(finding.rank not in (None, self.rank) for finding in found):
            return False
        return self.channels is None or any(
            entry.layer == self.layer and entry.num_in_state == len(self.channels) and entry.channels == self.channels
            for entry in report.channels
        )

    def names_cause(self, report: JobReport) -> bool:
        """Whether the kind is right, if not the place."""
        return bool(self._of_kind(report))

    def _of_kind(self, report: JobReport) -> list[JobFinding]:
        told = alarms(report) if self.channels is None else report.findings
        return [finding for finding in told if finding.kind in self.kinds]

    def _fits(self, finding: JobFinding) -> bool:
        return (
            self.layer in (None, finding.layer)
            and self.rank in (None, finding.rank)
            and self.step in (None, finding.step)
        )


def alarms(report: JobReport) -> list[JobFinding]:
    """What is more than a note."""
    return [finding for finding in report.findings if finding.severity in _ALARMING]
