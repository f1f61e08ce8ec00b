"""Traces of a service that is told where to send them, as a collector receives them."""

import http.server
import threading
from pathlib import Path

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.e2e.conftest import RunningService, small_spec, wait_for


class _Collector(http.server.ThreadingHTTPServer):
    """Takes OTLP over HTTP on loopback and keeps the name and attributes of every span."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receive)
        self.spans: dict[str, dict[str, str]] = {}
        self.services: set[str] = set()


class _Receive(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        collector = self.server
        assert isinstance(collector, _Collector)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/traces":
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                named = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
                collector.services.add(named["service.name"])
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        collector.spans[span.name] = {pair.key: pair.value.string_value for pair in span.attributes}
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing on stderr."""


def test_spans_name_routes_and_go_where_the_environment_says(tmp_path: Path) -> None:
    collector = _Collector()
    listening = threading.Thread(target=collector.serve_forever)
    listening.start()
    service = RunningService(
        tmp_path / "service",
        {
            "SYNCBN_RAY_ADDRESS": "http://127.0.0.1:9",
            "FASTAPI_OTEL_AUTO_CONFIGURE": "true",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_address[1]}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "OTEL_SERVICE_NAME": "training",
        },
    )
    try:
        service.start()
        with service.client() as client:
            job = client.submit(small_spec("traced", max_steps=1))
            client.job(job.id)
        wait_for(
            "the spans of both requests", lambda: {"POST /v1/jobs", "GET /v1/jobs/{job_id}"} <= set(collector.spans)
        )
    finally:
        service.stop()
        collector.shutdown()
        collector.server_close()
        listening.join(10)
    assert collector.services == {"training"}
    assert collector.spans["GET /v1/jobs/{job_id}"]["http.route"] == "/v1/jobs/{job_id}"
