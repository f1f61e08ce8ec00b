"""What a job can be, what it may become, and why: the whole state machine as data."""

from enum import StrEnum


class JobState(StrEnum):
    """Where a job stands. ``phase`` tells the detail, ``reason`` the why."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    RECOVERING = "recovering"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """Whether nothing may follow."""
        return not TRANSITIONS[self]

    @property
    def active(self) -> bool:
        """Whether the job may hold resources of the cluster."""
        return self in ACTIVE_STATES


_S = JobState

TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    _S.QUEUED: frozenset({_S.STARTING, _S.PAUSED, _S.CANCELLED, _S.FAILED}),
    _S.STARTING: frozenset({_S.RUNNING, _S.RECOVERING, _S.PAUSING, _S.CANCELLING, _S.FAILED}),
    _S.RUNNING: frozenset({_S.SUCCEEDED, _S.RECOVERING, _S.PAUSING, _S.CANCELLING, _S.FAILED}),
    _S.RECOVERING: frozenset({_S.STARTING, _S.QUEUED, _S.CANCELLING, _S.FAILED}),
    _S.PAUSING: frozenset({_S.PAUSED, _S.SUCCEEDED, _S.RECOVERING, _S.CANCELLING, _S.FAILED}),
    _S.PAUSED: frozenset({_S.QUEUED, _S.CANCELLED}),
    _S.CANCELLING: frozenset({_S.CANCELLED, _S.SUCCEEDED}),
    _S.SUCCEEDED: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELLED: frozenset(),
}

ACTIVE_STATES = frozenset({_S.STARTING, _S.RUNNING, _S.RECOVERING, _S.PAUSING, _S.CANCELLING})


class ReasonClass(StrEnum):
    """Who has to act on a reason; each class has its own retry budget."""

    USER_ERROR = "user_error"
    INFRA = "infra"
    CAPACITY = "capacity"
    PREEMPTED = "preempted"
    HANG = "hang"
    DEADLINE = "deadline"
    QUOTA = "quota"
    CANCELLED = "cancelled"
    RULE = "rule"
    SERVICE = "service"


class Reason(StrEnum):
    """Why a job is in its state. Each reason belongs to one class, for ever."""

    CANCELLED_BY_USER = "cancelled_by_user"
    PAUSED_BY_USER = "paused_by_user"
    CLUSTER_UNREACHABLE = "cluster_unreachable"
    CLUSTER_FULL = "cluster_full"
    BEHIND_OTHERS = "behind_others"
    OWNER_QUOTA = "owner_quota"
    WAITING_FOR_JOBS = "waiting_for_jobs"
    JOB_BEFORE_FAILED = "job_before_failed"
    PLACEMENT_TIMEOUT = "placement_timeout"
    WORKER_LOST = "worker_lost"
    RUNNER_LOST = "runner_lost"
    NO_HEARTBEAT = "no_heartbeat"
    COLLECTIVE_TIMEOUT = "collective_timeout"
    TRAINING_ERROR = "training_error"
    CHECKPOINT_UNUSABLE = "checkpoint_unusable"
    CHECKPOINT_FAILED = "checkpoint_failed"
    PREEMPTED = "preempted"
    QUEUE_DEADLINE = "queue_deadline"
    TOTAL_DEADLINE = "total_deadline"
    IDLE_DEADLINE = "idle_deadline"
    DIVERGED = "diverged"
    PLATEAU_REACHED = "plateau_reached"
    TARGET_REACHED = "target_reached"
    DRIFT_LIMIT = "drift_limit"
    SERVICE_STOPPED = "service_stopped"

    @property
    def reason_class(self) -> ReasonClass:
        """The class whose retry budget (`service.jobs.spec.Retries`) this reason is charged to."""
        return _CLASS_OF[self]


_CLASS_OF: dict[Reason, ReasonClass] = {
    Reason.CANCELLED_BY_USER: ReasonClass.CANCELLED,
    Reason.PAUSED_BY_USER: ReasonClass.CANCELLED,
    Reason.CLUSTER_UNREACHABLE: ReasonClass.INFRA,
    Reason.CLUSTER_FULL: ReasonClass.CAPACITY,
    Reason.BEHIND_OTHERS: ReasonClass.CAPACITY,
    Reason.OWNER_QUOTA: ReasonClass.QUOTA,
    Reason.WAITING_FOR_JOBS: ReasonClass.CAPACITY,
    Reason.JOB_BEFORE_FAILED: ReasonClass.USER_ERROR,
    Reason.PLACEMENT_TIMEOUT: ReasonClass.CAPACITY,
    Reason.WORKER_LOST: ReasonClass.INFRA,
    Reason.RUNNER_LOST: ReasonClass.INFRA,
    Reason.NO_HEARTBEAT: ReasonClass.HANG,
    Reason.COLLECTIVE_TIMEOUT: ReasonClass.HANG,
    Reason.TRAINING_ERROR: ReasonClass.USER_ERROR,
    Reason.CHECKPOINT_UNUSABLE: ReasonClass.USER_ERROR,
    Reason.CHECKPOINT_FAILED: ReasonClass.INFRA,
    Reason.PREEMPTED: ReasonClass.PREEMPTED,
    Reason.QUEUE_DEADLINE: ReasonClass.DEADLINE,
    Reason.TOTAL_DEADLINE: ReasonClass.DEADLINE,
    Reason.IDLE_DEADLINE: ReasonClass.DEADLINE,
    Reason.DIVERGED: ReasonClass.USER_ERROR,
    Reason.PLATEAU_REACHED: ReasonClass.RULE,
    Reason.TARGET_REACHED: ReasonClass.RULE,
    Reason.DRIFT_LIMIT: ReasonClass.RULE,
    Reason.SERVICE_STOPPED: ReasonClass.SERVICE,
}


class Phase(StrEnum):
    """What a job is doing inside its state."""

    WAITING_CLUSTER = "waiting_cluster"
    WAITING_RESOURCES = "waiting_resources"
    WAITING_QUOTA = "waiting_quota"
    WAITING_JOBS = "waiting_jobs"
    LAUNCHING = "launching"
    PLACING = "placing"
    RENDEZVOUS = "rendezvous"
    LOADING = "loading"
    TRAINING = "training"
    VALIDATING = "validating"
    CHECKPOINTING = "checkpointing"
