"""`make bench`: every benchmark, one after the other."""

from benchmarks import api_latency, first_step, telemetry

for benchmark in (api_latency, first_step, telemetry):
    benchmark.main()
