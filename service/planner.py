"""Asks what a spec would become of a process of its own: the service itself never loads torch."""

import json
import subprocess
import sys
import threading

from service.errors import FieldProblem, InvalidRequest, ServiceError
from service.jobs import JobPlan, JobSpec

_IMPOSSIBLE = 2
_NUM_REMEMBERED = 64
_SAME_PLAN = {"name": "unnamed", "seed": 0, "priority": 0, "after": ()}


class PlannerUnavailable(ServiceError):
    """The planner is busy with others, or did not answer in time."""

    status = 503
    code = "planner_unavailable"
    title = "No plan can be made now"
    retryable = True


class Planner:
    """Makes plans one at a time, some seconds each; remembers the last 64."""

    def __init__(self, timeout_s: float = 60.0) -> None:
        self._timeout_s = timeout_s
        self._working = threading.Lock()
        self._remembered: dict[str, JobPlan] = {}

    def plan(self, spec: JobSpec) -> JobPlan:
        """The plan of ``spec``.

        Raises: InvalidRequest where its training would refuse to begin or its data are not on this machine;
            PlannerUnavailable after ``timeout_s``.
        """
        # What differs in a name alone has the same plan.
        wanted = spec.model_copy(update=_SAME_PLAN).model_dump_json()
        if (known := self._remembered.get(wanted)) is not None:
            return known  # not waiting for whatever other plan is being made
        if not self._working.acquire(timeout=self._timeout_s):
            raise PlannerUnavailable("other plans are being made; ask again in a moment")
        try:
            return self._remembered.get(wanted) or self._remember(wanted, self._ask(wanted))
        finally:
            self._working.release()

    def _remember(self, wanted: str, plan: JobPlan) -> JobPlan:
        while len(self._remembered) >= _NUM_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]
        self._remembered[wanted] = plan
        return plan

    def _ask(self, spec: str) -> JobPlan:
        command = [sys.executable, "-P", "-m", "service.training.plan"]
        try:
            answer = subprocess.run(
                command, input=spec, capture_output=True, text=True, timeout=self._timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            raise PlannerUnavailable(f"no plan after {self._timeout_s:g} s; is the machine overloaded?") from None
        if answer.returncode == _IMPOSSIBLE:
            problem = json.loads(answer.stdout)
            raise InvalidRequest([FieldProblem(problem["pointer"], "cannot_be_planned", problem["message"])])
        if answer.returncode != 0:
            last_line = (answer.stderr.strip().splitlines() or ["no word"])[-1]
            raise PlannerUnavailable(f"the planner failed: {last_line}")
        return JobPlan.model_validate_json(answer.stdout)
