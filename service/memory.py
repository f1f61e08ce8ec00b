"""Opens the memory that the settings name; for every command that needs it, the service's own among them."""

from service.settings import Settings
from service.store import JobStore


def open_store(settings: Settings) -> JobStore:
    """The store of the service with these settings. Raises: StoreUnavailable."""
    return JobStore.open(settings.database_path)
