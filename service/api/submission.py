"""A submitted spec: JSON that becomes a `JobSpec`, or one list of all that is wrong with it."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from pydantic import ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from service.api.pointers import body_problems
from service.errors import FieldProblem
from service.jobs import JobSpec

CheckPlacement = Callable[[JobSpec], Sequence[FieldProblem]]


class WrongSpec(Exception):
    """What was submitted is no spec. Carries it, because the cluster may have a word on it too."""

    def __init__(self, submitted: object, error: ValidationError) -> None:
        self._submitted = submitted
        self._error = error
        super().__init__(str(error))

    def problems(self, check_placement: CheckPlacement) -> list[FieldProblem]:
        """Every wrong field, and why the cluster could not hold the job as far as its fields are right."""
        found = body_problems(self._error.errors(), self._submitted)
        rest = self._right_part()
        if rest is not None:
            named = {problem.pointer for problem in found}
            found += [problem for problem in check_placement(rest) if problem.pointer not in named]
        return found

    def _right_part(self) -> JobSpec | None:
        """A spec of the fields that are right, or None where too little is."""
        if not isinstance(self._submitted, dict):
            return None
        wrong = {error["loc"][0] for error in self._error.errors() if error["loc"]}
        rest = {name: field for name, field in self._submitted.items() if name not in wrong}
        if not {"epochs", "max_steps"} & set(rest):
            rest["max_steps"] = 1
        try:
            return JobSpec.model_validate({"name": "unnamed", **rest})
        except ValidationError:
            return None


def _judge(submitted: Any, build: ValidatorFunctionWrapHandler) -> JobSpec:
    try:
        spec = build(submitted)
    except ValidationError as error:
        raise WrongSpec(submitted, error) from None
    assert isinstance(spec, JobSpec)
    return spec


Submission = Annotated[JobSpec, WrapValidator(_judge)]
