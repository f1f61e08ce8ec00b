"""Settings of the service, read from ``SYNCBN_*`` here and nowhere else."""

import os
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

from pydantic import Field, HttpUrl, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """What an operator may choose; each field is the variable ``SYNCBN_<FIELD>``."""

    model_config = SettingsConfigDict(env_prefix="SYNCBN_", frozen=True, extra="ignore")

    data_dir: Path = Path(".syncbn")
    """Database, checkpoints, logs, lock and the local Ray head's state."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8400
    """0 lets the system choose."""
    public_url: HttpUrl | None = None
    """Where workers reach this service; by default its own host and port."""
    api_token: SecretStr | None = None
    """When set, every ``/v1`` request must carry it as a bearer token. Needed to listen beyond loopback."""
    storage: Path | None = None
    """Folder for checkpoints, the same path here and on every worker; by default inside ``data_dir``."""
    ray_address: HttpUrl | None = None
    """The job server of an existing Ray cluster, such as http://head:8265; without it a local head is kept."""
    ray_token: SecretStr | None = None
    """The Ray cluster's authentication token; the local head makes its own."""
    local_ray_cpus: Annotated[int, Field(ge=1)] | None = None
    """Logical CPUs of the local head; by default those of the machine, at least 2."""

    @property
    def database_path(self) -> Path:
        """The SQLite file."""
        return self.data_dir / "syncbn.sqlite"

    @property
    def storage_path(self) -> Path:
        """Where jobs keep their checkpoints, absolute because workers start in folders of their own."""
        return (self.storage or self.data_dir / "storage").absolute()

    @property
    def num_local_cpus(self) -> int:
        """CPUs that the local Ray head offers."""
        return self.local_ray_cpus or max(os.cpu_count() or 1, 2)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class ClientSettings(BaseSettings):
    """Which service the command line and the Python client talk to."""

    model_config = SettingsConfigDict(env_prefix="SYNCBN_", frozen=True, extra="ignore")

    url: HttpUrl = HttpUrl("http://127.0.0.1:8400")
    api_token: SecretStr | None = None
