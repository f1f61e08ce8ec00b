"""Services that share one PostgreSQL database: whichever of them dies, each job runs, and runs once."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from service.jobs import AttemptEnded, JobSpec, JobState, LaunchRequest, Outcome, attempt_id
from service.scheduler import Scheduler, ScriptedLauncher
from service.store import JobStore
from tests.postgresql import PostgresServer
from tests.service.store.telling import batch, started

NUM_SERVICES, NUM_JOBS = 3, 9


def test_each_job_is_launched_once_while_one_scheduling_service_after_another_dies(
    postgresql: PostgresServer, tmp_path: Path
) -> None:
    """A dying service just stops, lease in hand; its job is the next one's when the lease has expired."""
    database = postgresql.new_database()
    launches: list[tuple[str, int]] = []
    deadline = time.monotonic() + 60

    with ExitStack() as stack:
        stores = [JobStore.connect(postgresql.url(database)) for _ in range(NUM_SERVICES)]
        for store in stores:
            stack.callback(store.close)

        def run_to_its_end(request: LaunchRequest, token: str) -> None:
            """The attempt reports to any of the services."""
            launches.append((request.job_id, request.attempt))
            store = stores[len(launches) % NUM_SERVICES]
            name = attempt_id(request.job_id, request.attempt)
            store.ingest(name, token, batch([started()], rank=0))
            store.ingest(name, token, batch([started()], rank=1))
            store.ingest(name, token, batch([AttemptEnded(outcome=Outcome.SUCCEEDED)], rank=-1))

        cluster = ScriptedLauncher(num_cpus=2, on_launch=run_to_its_end)
        ready = threading.Barrier(NUM_SERVICES)
        dead: list[int] = []  # whoever leads dies next, and the last one ends what is left

        def serve(index: int) -> None:
            scheduler = Scheduler(
                stores[index],
                cluster,
                ingest_url="http://127.0.0.1:1",
                storage=tmp_path,
                lease_ttl_s=0.3,
                observe_every_s=0,
                capacity_every_s=0,
            )
            ready.wait(30)
            num_launched = 0
            while stores[index].unfinished() and time.monotonic() < deadline:
                before = len(launches)
                scheduler.tick()
                num_launched += (len(launches) - before) * bool(scheduler.gauges["syncbn_scheduler_leads"])
                if num_launched >= NUM_JOBS // NUM_SERVICES and len(dead) < NUM_SERVICES - 1:
                    dead.append(index)
                    return

        jobs = [stores[0].create(JobSpec(name="t", epochs=1, num_workers=2))[0] for _ in range(NUM_JOBS)]
        with ThreadPoolExecutor(NUM_SERVICES) as pool:
            list(pool.map(serve, range(NUM_SERVICES)))
        assert stores[0].states_of(job.id for job in jobs) == {job.id: JobState.SUCCEEDED for job in jobs}
    assert sorted(launches) == sorted((job.id, 1) for job in jobs)
    ((token,),) = postgresql.execute("SELECT token FROM leases", database)
    assert len(dead) == NUM_SERVICES - 1
    assert token >= NUM_SERVICES  # the lease has changed hands at every death
