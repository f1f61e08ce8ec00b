"""ScriptedLauncher: the published fake at the `Launcher` seam, for tests of what decides, without a cluster."""

from collections.abc import Callable

from service.errors import ClusterUnreachable
from service.jobs import LaunchRequest
from service.scheduler.launcher import ClusterCapacity, LaunchState, NodeResources, Observation


class ScriptedLauncher:
    """A cluster that does what its owner says.

    ``on_launch`` is called with each new attempt and its ingest token, so that a test can report for it.
    Set ``reachable`` to False and every method raises `ClusterUnreachable`, or ``takes_jobs`` and `launch` alone does;
    end an attempt with `finish`.
    """

    def __init__(
        self,
        num_cpus: float = 8,
        on_launch: Callable[[LaunchRequest, str], None] = lambda request, token: None,
    ) -> None:
        self.reachable = True
        self.takes_jobs = True
        self.num_refused = 0
        self.launched: list[LaunchRequest] = []
        self.stopped: list[str] = []
        self._on_launch = on_launch
        self._observations: dict[str, Observation] = {}
        self.resize(num_cpus)

    def resize(self, num_cpus: float) -> None:
        """From now on the cluster is one node of so many CPUs."""
        self._nodes = (NodeResources(cpus=num_cpus, gpus=0, memory_gib=64),)

    def finish(self, attempt_id: str, state: LaunchState, message: str = "") -> None:
        """From now on the cluster says this of the attempt."""
        self._observations[attempt_id] = Observation(state, message)

    def forget(self, attempt_id: str) -> None:
        """Lose all memory of the attempt, as a restarted cluster does."""
        del self._observations[attempt_id]

    def capacity(self) -> ClusterCapacity:
        """See `Launcher`."""
        self._answer()
        return ClusterCapacity(self._nodes)

    def launch(self, request: LaunchRequest, ingest_token: str) -> None:
        """See `Launcher`."""
        self._answer()
        if request.attempt_id in self._observations:
            return
        if not self.takes_jobs:
            self.num_refused += 1
            raise ClusterUnreachable("the scripted cluster is told to take no job")
        self._observations[request.attempt_id] = Observation(LaunchState.RUNNING)
        self.launched.append(request)
        self._on_launch(request, ingest_token)

    def observe(self, attempt_id: str) -> Observation:
        """See `Launcher`."""
        self._answer()
        return self._observations.get(attempt_id, Observation(LaunchState.UNKNOWN))

    def stop(self, attempt_id: str) -> None:
        """See `Launcher`."""
        self._answer()
        self.stopped.append(attempt_id)
        if not self.observe(attempt_id).state.over:
            self.finish(attempt_id, LaunchState.STOPPED)

    def output(self, attempt_id: str) -> str:
        """See `Launcher`."""
        self._answer()
        return f"last lines of {attempt_id}"

    def _answer(self) -> None:
        if not self.reachable:
            raise ClusterUnreachable("the scripted cluster is told not to answer")
