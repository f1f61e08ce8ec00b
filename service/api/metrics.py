"""What the service measures of itself, for Prometheus: requests, jobs, telemetry taken in, streams, scheduler.

Durations of requests come from FastAPI's own OpenTelemetry support; the rest is counted here. All names begin with
``syncbn_`` or are OpenTelemetry's (``http_server_*``).
"""

from collections.abc import Callable, Iterable, Mapping

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import CollectorRegistry, Counter, ProcessCollector
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.jobs import JobState


class Metrics:
    """The counters of one app, and what it asks of others whenever it is read.

    ``num_jobs`` counts jobs by state; ``gauges`` tells, by metric name, what other parts know of themselves.
    """

    def __init__(
        self, num_jobs: Callable[[], Mapping[JobState, int]], gauges: Callable[[], Mapping[str, float]]
    ) -> None:
        self._registry = CollectorRegistry()
        reader = PrometheusMetricReader(disable_target_info=True, scope_info_enabled=False, registry=self._registry)
        self.meter_provider = MeterProvider([reader], shutdown_on_exit=False)
        """Where FastAPI puts what it measures of requests."""
        self.num_facts = Counter(
            "syncbn_telemetry_facts", "Facts that attempts have reported.", registry=self._registry
        )
        ProcessCollector(registry=self._registry)
        self._registry.register(_Asked(num_jobs, gauges))

    def text(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self._registry)


class _Asked(Collector):
    """Metrics that are looked up whenever they are read."""

    def __init__(
        self, num_jobs: Callable[[], Mapping[JobState, int]], gauges: Callable[[], Mapping[str, float]]
    ) -> None:
        self._num_jobs = num_jobs
        self._gauges = gauges

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not ask the database."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The jobs of every state, and what other parts tell. Raises: StoreUnavailable."""
        counted = self._num_jobs()
        jobs = GaugeMetricFamily("syncbn_jobs", "Jobs by state.", labels=["state"])
        for state in JobState:
            jobs.add_metric([state], counted.get(state, 0))
        yield jobs
        for name, value in self._gauges().items():
            yield GaugeMetricFamily(name, MEANINGS[name], value=value)


MEANINGS = {
    "syncbn_cluster_up": "Whether the cluster answers.",
    "syncbn_open_streams": "Readers that follow a job now.",
    "syncbn_scheduler_leads": "Whether this process schedules, of all that share the database.",
    "syncbn_scheduler_tick_age_seconds": "Time since the scheduler last looked at all jobs.",
}
"""Every metric that other parts may tell, and what it means."""
