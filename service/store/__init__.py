"""The service's memory: jobs, attempts, events, metrics and logs. The only part that speaks SQL."""

from service.store.glances import Glance
from service.store.inspection import Inspection, inspect_postgresql, inspect_sqlite
from service.store.lanes import Pending
from service.store.leases import Lease, LeaseLost
from service.store.retention import Retention, Told
from service.store.step_arrays import STEP
from service.store.store import JobStore
from service.store.upgrade import SchemaAge

__all__ = [
    "STEP",
    "Glance",
    "Inspection",
    "JobStore",
    "Lease",
    "LeaseLost",
    "Pending",
    "Retention",
    "SchemaAge",
    "Told",
    "inspect_postgresql",
    "inspect_sqlite",
]
