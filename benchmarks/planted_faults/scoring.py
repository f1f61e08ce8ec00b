"""How often the verdict was right, with the exact interval of Clopper and Pearson 1934."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from scipy import stats

from benchmarks.planted_faults.examinations import Findings
from benchmarks.planted_faults.expectations import EXPECTED
from benchmarks.planted_faults.page import Shown
from benchmarks.planted_faults.scenarios import Scenario, Severity
from benchmarks.planted_faults.verdicts import alarms
from service.jobs import FindingKind, JobFinding

_ROUNDING = 1e-6
_FALSE_ALARMS = {
    4: (FindingKind.RANK_DIFFERS, FindingKind.RANK_REPEATS, FindingKind.BUFFERS_DIFFER, FindingKind.OTHER_DATA),
    19: (),
    22: (FindingKind.WORSENING, FindingKind.OTHER_DATA),
}
"""By number of the scenario, what is false in runs that are healthy but for other faults: wrong labels, few steps."""


@dataclass(frozen=True)
class Score:
    """Of one run: whether the fault was found with its right cause, or of a healthy run whether anything was."""

    seed: int
    found: bool
    cause: bool
    """Whether the cause was right, wherever it was sought."""
    findings: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """Of one scenario: how many of how many, with a 95 % interval; which other alarms there were, in how many runs."""

    scenario: str
    says: str
    severity: str
    target: float | None
    num_runs: int
    num_found: int
    num_right_cause: int
    """Found, or found without the right layer, rank or channels."""
    share: float
    low: float
    high: float
    also: dict[str, int]
    examined: dict[str, float]
    seconds: float | None
    """Of a job of a service, on average."""

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def score(run: Shown) -> Score:
    """The verdict on the run's page."""
    found = alarms(run.page)
    expected = EXPECTED.get(run.scenario.key)
    if expected is None:
        is_found = bool(_false_alarms(run, found)) or any(run.failures)
        return Score(run.seed, is_found, is_found, tuple(map(_in_words, found)))
    wanted = expected(run.seed)
    is_found = wanted.is_met(run.page, run.failures)
    return Score(run.seed, is_found, is_found or wanted.names_cause(run.page), tuple(map(_in_words, found)))


def row(scenario: Scenario, runs: Sequence[Shown]) -> Row:
    """All runs of one scenario. Raises: ValueError without any."""
    scores = [score(run) for run in runs]
    num_found = sum(one.found for one in scores)
    interval = stats.binomtest(num_found, len(scores)).proportion_ci(0.95, method="exact")
    times = [run.seconds for run in runs if run.seconds is not None]
    counted = Counter(kind for one in scores for kind in {words.split()[0] for words in one.findings})
    return Row(
        scenario=scenario.key,
        says=scenario.says,
        severity=scenario.severity,
        target=scenario.target,
        num_runs=len(scores),
        num_found=num_found,
        num_right_cause=sum(one.cause for one in scores),
        share=num_found / len(scores),
        low=float(interval.low),
        high=float(interval.high),
        also=dict(sorted(counted.items())),
        examined=_means([run.examined for run in runs]),
        seconds=sum(times) / len(times) if times else None,
    )


def table(rows: Sequence[Row]) -> str:
    """For people, in Markdown."""
    lines = ["| scenario | | target | found | 95 % interval | cause right | alarms |", "|" + 7 * "---|"]
    for one in rows:
        target = "" if one.target is None else ("at most " if _is_healthy(one) else "") + f"{one.target:.0%}"
        also = ", ".join(f"{kind} {number}" for kind, number in one.also.items())
        lines.append(
            f"| {one.scenario} | {one.says} | {target} | {one.num_found}/{one.num_runs} | "
            f"{one.low:.0%} to {one.high:.0%} | {one.num_right_cause} | {also} |"
        )
    return "\n".join(lines)


def _is_healthy(one: Row) -> bool:
    return one.severity == Severity.HEALTHY


def _false_alarms(run: Shown, found: Sequence[JobFinding]) -> list[str]:
    kinds = _FALSE_ALARMS.get(run.scenario.number, tuple(FindingKind))
    wrong = [_in_words(finding) for finding in found if finding.kind in kinds]
    if run.examined.get("error", 0.0) >= _ROUNDING:
        wrong.append("statistics differ")
    if run.examined.get("alarms", 0.0) > 0:
        wrong.append("ranks differ")
    return wrong


def _in_words(finding: JobFinding) -> str:
    places = {"layer": finding.layer, "rank": finding.rank, "step": finding.step}
    where = " ".join(f"{name}={value}" for name, value in places.items() if value is not None)
    return f"{finding.kind} {finding.severity} {where}".strip()


def _means(examined: Sequence[Findings]) -> dict[str, float]:
    return {name: sum(one[name] for one in examined) / len(examined) for name in examined[0]}
