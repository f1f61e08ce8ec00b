"""The memory that the settings name, and for how long it keeps things; for every command that needs it."""

from service.errors import ServiceError
from service.settings import Settings
from service.store import Inspection, JobStore, Retention, inspect_postgresql, inspect_sqlite


class NoSharedCluster(ServiceError):
    """Services that share a database would each keep a cluster of their own."""

    code = "no_shared_cluster"
    title = "A shared database needs a shared cluster"


def open_store(settings: Settings) -> JobStore:
    """The store of the service with these settings. Raises: StoreUnavailable."""
    if settings.database_url is not None:
        return JobStore.connect(settings.database_url)
    return JobStore.open(settings.database_path)


def inspect_store(settings: Settings) -> Inspection:
    """What is to be seen of the database without touching it. Raises: StoreUnavailable."""
    if settings.database_url is not None:
        return inspect_postgresql(settings.database_url)
    return inspect_sqlite(settings.database_path)


def retention_of(settings: Settings) -> Retention:
    """For how long what ended jobs have told is kept."""
    return Retention(settings.keep_metrics_days, settings.keep_logs_days, settings.keep_events_days)


def refuse_unshared_cluster(settings: Settings) -> None:
    """Return if every service on this database finds the same cluster. Raises: NoSharedCluster."""
    if settings.database_url is not None and settings.ray_address is None:
        raise NoSharedCluster(
            "refusing to keep a local Ray head for a database that other services may share: whichever of them "
            "schedules must reach the jobs that another has started; set SYNCBN_RAY_ADDRESS to the cluster of all, "
            "or unset SYNCBN_DATABASE_URL"
        )
