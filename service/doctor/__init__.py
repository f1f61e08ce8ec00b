"""The doctor: looks at a machine and its settings for what most often keeps a service or a job from running."""

from collections.abc import Iterator

from service.doctor.cluster import look_at_cluster
from service.doctor.database import look_at_database
from service.doctor.finding import Finding
from service.doctor.folders import look_at_folders
from service.doctor.machine import look_at_machine
from service.doctor.network import look_at_network
from service.settings import ClientSettings, Settings

__all__ = ["Finding", "examine"]


def examine(settings: Settings, client_settings: ClientSettings) -> list[Finding]:
    """Make every check; none changes anything, and none takes longer than a few seconds."""
    return list(_examine(settings, client_settings))


def _examine(settings: Settings, client_settings: ClientSettings) -> Iterator[Finding]:
    yield from look_at_machine()
    yield from look_at_folders(settings)
    keys_made, findings = look_at_database(settings)
    yield from findings
    yield from look_at_network(settings, client_settings, keys_made=keys_made)
    yield from look_at_cluster(settings)
