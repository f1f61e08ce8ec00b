"""`make bench`: every benchmark, one after the other."""

from benchmarks import (
    api_latency,
    first_step,
    layer_exchange,
    layer_kernels,
    layer_step,
    monitor,
    service,
    store,
    telemetry,
)

for benchmark in (
    layer_step,
    layer_kernels,
    layer_exchange,
    monitor,
    api_latency,
    first_step,
    service,
    store,
    telemetry,
):
    benchmark.main()
