"""Asks what a spec would become of a process of its own: the service itself never loads torch."""

import json
import subprocess
import sys
import threading
from functools import lru_cache

from service.errors import FieldProblem, InvalidRequest, ServiceError
from service.jobs import JobPlan, JobSpec

_IMPOSSIBLE = 2
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
        self._remembered = lru_cache(maxsize=64)(self._ask)

    def plan(self, spec: JobSpec) -> JobPlan:
        """The plan of ``spec``.

        Raises: InvalidRequest where its training would refuse to begin or its data are not on this machine;
            PlannerUnavailable after ``timeout_s``.
        """
        if not self._working.acquire(timeout=self._timeout_s):
            raise PlannerUnavailable("other plans are being made; ask again in a moment")
        try:
            # What differs in a name alone has the same plan.
            return self._remembered(spec.model_copy(update=_SAME_PLAN).model_dump_json())
        finally:
            self._working.release()

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
