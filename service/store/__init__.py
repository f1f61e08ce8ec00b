"""The service's memory: jobs, attempts, events, metrics and logs. The only part that speaks SQL."""

from service.store.leases import Lease, LeaseLost
from service.store.store import JobStore

__all__ = ["JobStore", "Lease", "LeaseLost"]
