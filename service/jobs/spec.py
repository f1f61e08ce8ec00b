"""JobSpec: everything a person says about a training job, checked at birth and frozen after it."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from service.jobs.diagnostics import Diagnostics, DriftLimit, StopRule, Target
from service.jobs.spec_part import SpecPart
from service.jobs.states import ReasonClass

BUILTIN_DATA = ("digits", "fashion-mnist")


class Normalization(StrEnum):
    """Over what a BatchNorm layer takes its batch statistics."""

    SYNC = "sync"
    """The batches of all workers together (`syncbn.SyncBatchNorm`)."""
    LOCAL = "local"
    """Each worker's own batch (torch's BatchNorm; buffers follow rank 0, as DDP does by default)."""


class Precision(StrEnum):
    """The arithmetic of forward and backward; statistics and parameters are never below float32."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    BFLOAT16 = "bfloat16"


class Mlp(SpecPart):
    """Linear, BatchNorm, ReLU for each hidden size, then a linear layer to the classes."""

    name: Literal["mlp"] = "mlp"
    hidden_sizes: Annotated[tuple[Annotated[int, Field(ge=1, le=65536)], ...], Field(min_length=1)] = (
        64,
        64,
        64,
    )


class ResNet20(SpecPart):
    """The CIFAR ResNet of He et al. 2016, section 4.2, with 20 layers; ``width`` channels in the first stage."""

    name: Literal["resnet20"] = "resnet20"
    width: Annotated[int, Field(ge=1, le=1024)] = 16


class Sgd(SpecPart):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    nesterov: bool = False


class AdamW(SpecPart):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    name: Literal["adamw"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01


class Schedule(SpecPart):
    """The learning rate over the run: linear warmup from near zero, then constant or cosine to zero."""

    name: Literal["constant", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0


class Cadence(SpecPart):
    """How often the run looks at itself, in steps; ``null`` means once an epoch. The last step always looks."""

    evaluate_every_steps: Annotated[int, Field(ge=1)] | None = None
    drift_every_steps: Annotated[int, Field(ge=1)] | None = None
    checkpoint_every_steps: Annotated[int, Field(ge=1)] | None = None


class WorkerResources(SpecPart):
    """What each worker reserves on the cluster; a worker with GPUs exchanges over NCCL, else over gloo."""

    cpus: Annotated[float, Field(gt=0, le=1024)] = 1.0
    gpus: Annotated[int, Field(ge=0, le=16)] = 0
    memory_gib: Annotated[float, Field(gt=0)] | None = None


class Timeouts(SpecPart):
    """How long each wait may last, in seconds, before it is called by its name and acted on."""

    queue_s: Annotated[float, Field(gt=0)] | None = None
    total_s: Annotated[float, Field(gt=0)] | None = None
    idle_s: Annotated[float, Field(gt=0)] | None = None
    """How long a running job may take no step, whatever else it does."""
    placement_s: Annotated[float, Field(gt=0)] = 120.0
    rendezvous_s: Annotated[float, Field(gt=0)] = 120.0
    collective_s: Annotated[float, Field(gt=0)] = 60.0
    heartbeat_s: Annotated[float, Field(gt=0)] = 60.0
    stop_grace_s: Annotated[float, Field(ge=0)] = 60.0
    """How long a job that is told to stop may take to save and leave by itself."""


class Retries(SpecPart):
    """New attempts granted per class of reason; what is the job's own fault is never retried."""

    infra: Annotated[int, Field(ge=0, le=1000)] = 3
    capacity: Annotated[int, Field(ge=0, le=1000)] = 3
    preempted: Annotated[int, Field(ge=0, le=1000)] = 10
    hang: Annotated[int, Field(ge=0, le=1000)] = 2

    def of_class(self, reason_class: ReasonClass) -> int:
        """How many recoveries a job may make for reasons of this class."""
        return int(getattr(self, reason_class, 0))


def _check_data(uri: str) -> str:
    scheme, _, rest = uri.partition(":")
    if scheme == "builtin" and rest in BUILTIN_DATA:
        return uri
    if scheme == "idx" and rest:
        if not PurePosixPath(rest).is_absolute():
            raise PydanticCustomError(
                "data_path",
                "{path} is not an absolute path; workers start in a folder of their own",
                {"path": rest},
            )
        return uri
    known = ", ".join(f"builtin:{name}" for name in BUILTIN_DATA)
    raise PydanticCustomError(
        "data_unknown",
        "unknown data set {uri}; known are {known}, idx:/PATH",
        {"uri": repr(uri), "known": known},
    )


def _check_after(jobs: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(jobs)) < len(jobs):
        raise PydanticCustomError("after_repeated", "names a job twice; name each once")
    return jobs


def _check_stop_when(rules: tuple[StopRule, ...]) -> tuple[StopRule, ...]:
    if len(set(rules)) < len(rules):
        raise PydanticCustomError("rule_repeated", "names a rule twice; name each once")
    return rules


class JobSpec(SpecPart):
    """A training job as its owner describes it.

    A spec that exists is consistent: construction checks each field, then every combination, and reports
    all that is wrong at once.
    """

    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[\w .:/-]+$")]
    model: Annotated[Mlp | ResNet20, Field(discriminator="name")] = Mlp()
    data: Annotated[str, AfterValidator(_check_data)] = "builtin:digits"
    normalization: Normalization = Normalization.SYNC
    bn_momentum: Annotated[float, Field(gt=0, le=1)] = 0.1
    num_workers: Annotated[int, Field(ge=1, le=4096)] = 2
    batch_size_per_worker: Annotated[int, Field(ge=1, le=65536)] = 32
    epochs: Annotated[int, Field(ge=1)] | None = None
    max_steps: Annotated[int, Field(ge=1)] | None = None
    optimizer: Annotated[Sgd | AdamW, Field(discriminator="name")] = Sgd()
    schedule: Schedule = Schedule()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    precision: Precision = Precision.FLOAT32
    cadence: Cadence = Cadence()
    resources: WorkerResources = WorkerResources()
    timeouts: Timeouts = Timeouts()
    retries: Retries = Retries()
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Of two waiting jobs of one owner the greater goes first; equals go in order of submission."""
    after: Annotated[
        tuple[Annotated[str, Field(pattern=r"^job_[0-9A-Z]{26}$")], ...],
        Field(max_length=32),
        AfterValidator(_check_after),
    ] = ()
    """Jobs that must have succeeded before this one starts; if one ends otherwise, this one fails."""
    diagnostics: Diagnostics = Diagnostics()
    recompute_bn: bool = False
    """Whether every checkpoint also holds population statistics; the run itself goes on as without."""
    target: Target | None = None
    stop_when: Annotated[tuple[StopRule, ...], Field(max_length=3), AfterValidator(_check_stop_when)] = ()
    drift_limits: Annotated[tuple[DriftLimit, ...], Field(max_length=64)] = ()

    @property
    def global_batch_size(self) -> int:
        """Images in one step over all workers."""
        return self.num_workers * self.batch_size_per_worker

    @property
    def normalization_batch_size(self) -> int:
        """Images that share one batch statistic."""
        sync = self.normalization is Normalization.SYNC
        return self.global_batch_size if sync else self.batch_size_per_worker

    @model_validator(mode="wrap")
    @classmethod
    def _all_errors_at_once(cls, value: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        """Judge the combinations too when single fields are wrong, on what is right of the rest."""
        if isinstance(value, cls):
            return value
        spec: Self | None
        try:
            spec, field_errors = build(value), None
        except ValidationError as error:
            if not isinstance(value, dict):
                raise
            spec, field_errors = _spec_of_valid_fields(value, error, build), error
        wrong_fields = {str(e["loc"][0]) for e in field_errors.errors() if e["loc"]} if field_errors else set()
        problems = [problem for check in _COMBINATIONS for problem in check(spec, wrong_fields)] if spec else []
        if not problems:
            if field_errors is not None:
                raise field_errors
            assert spec is not None
            return spec
        lines = [_as_line_error(e) for e in field_errors.errors()] if field_errors else []
        raise ValidationError.from_exception_data(cls.__name__, [*lines, *problems])


_AnySpec = TypeVar("_AnySpec", bound=JobSpec)


def _spec_of_valid_fields(
    value: dict[str, Any], error: ValidationError, build: Callable[[Any], _AnySpec]
) -> _AnySpec | None:
    wrong = {e["loc"][0] for e in error.errors() if e["loc"]}
    rest = {name: field for name, field in value.items() if name not in wrong}
    try:
        return build({"name": "unnamed", **rest})
    except ValidationError:
        return None


def _as_line_error(error: Any) -> InitErrorDetails:
    kind = PydanticCustomError(error["type"], error["msg"].replace("{", "(").replace("}", ")"))
    return InitErrorDetails(type=kind, loc=error["loc"], input=error["input"])


def _problem(loc: tuple[str, ...], value: object, message: str) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError("impossible_combination", message), loc=loc, input=value)


_Check = Callable[[JobSpec, set[str]], list[InitErrorDetails]]


def _check_budget(spec: JobSpec, wrong: set[str]) -> list[InitErrorDetails]:
    if {"epochs", "max_steps"} & wrong or (spec.epochs is None) != (spec.max_steps is None):
        return []
    text = "give epochs or max_steps" if spec.epochs is None else "give epochs or max_steps, not both"
    return [_problem(("epochs",), spec.epochs, text)]


def _check_batch(spec: JobSpec, wrong: set[str]) -> list[InitErrorDetails]:
    if {"model", "normalization", "num_workers", "batch_size_per_worker"} & wrong:
        return []
    if spec.normalization_batch_size >= 2 or not isinstance(spec.model, Mlp):
        return []
    remedy = "raise it" if spec.num_workers == 1 else "raise it, or choose normalization sync"
    text = f"a fully connected BatchNorm over 1 image has no variance; {remedy} to at least 2"
    return [_problem(("batch_size_per_worker",), spec.batch_size_per_worker, text)]


def _check_warmup(spec: JobSpec, wrong: set[str]) -> list[InitErrorDetails]:
    if {"schedule", "max_steps"} & wrong or spec.max_steps is None:
        return []
    if spec.schedule.warmup_steps < spec.max_steps or spec.schedule.warmup_steps == 0:
        return []
    text = f"the warmup must end before the run does, at step {spec.max_steps}"
    return [_problem(("schedule", "warmup_steps"), spec.schedule.warmup_steps, text)]


def _check_nesterov(spec: JobSpec, wrong: set[str]) -> list[InitErrorDetails]:
    if "optimizer" in wrong or not isinstance(spec.optimizer, Sgd):
        return []
    if not spec.optimizer.nesterov or spec.optimizer.momentum > 0:
        return []
    return [_problem(("optimizer", "nesterov"), True, "Nesterov needs a momentum above 0")]


def _check_target(spec: JobSpec, wrong: set[str]) -> list[InitErrorDetails]:
    if {"target", "stop_when"} & wrong or StopRule.TARGET not in spec.stop_when or spec.target is not None:
        return []
    return [_problem(("target",), None, "stop_when names the target; give one, such as an accuracy of 0.97")]


def _check_target_value(spec: JobSpec, wrong: set[str]) -> list[InitErrorDetails]:
    if "target" in wrong or spec.target is None or spec.target.metric != "accuracy" or spec.target.value <= 1:
        return []
    return [_problem(("target", "value"), spec.target.value, "an accuracy is a share of 1, such as 0.97")]


_COMBINATIONS: tuple[_Check, ...] = (
    _check_budget,
    _check_batch,
    _check_warmup,
    _check_nesterov,
    _check_target,
    _check_target_value,
)
