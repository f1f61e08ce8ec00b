"""Another process that wants the same lease; it imports little, so that it starts soon."""

from multiprocessing.synchronize import Barrier

from pydantic import SecretStr

from service.store import JobStore


def ask_for_the_lease(url: str, start: Barrier) -> None:
    """Ask when everyone is ready; exit with 1 if it was given the lease, else with 0."""
    store = JobStore.connect(SecretStr(url))
    start.wait(60)
    lease = store.acquire_lease("scheduler", "rival", 60.0)
    store.close()
    raise SystemExit(0 if lease is None else 1)
