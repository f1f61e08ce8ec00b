"""Settings of the service, read from ``SYNCBN_*`` here and nowhere else."""

import os
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, HttpUrl, SecretStr, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

_Rate = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}/(second|minute|hour)$")]


def _or_for_ever(days: object) -> object:
    return None if days == "forever" else days


_Days = Annotated[Annotated[float, Field(ge=0)] | None, BeforeValidator(_or_for_ever)]
"""A number of days, or ``forever``, which is None."""


def _split(paths: object) -> object:
    return tuple(filter(None, paths.split(os.pathsep))) if isinstance(paths, str) else paths


def _split_at_commas(networks: object) -> object:
    return tuple(filter(None, map(str.strip, networks.split(",")))) if isinstance(networks, str) else networks


class Settings(BaseSettings):
    """What an operator may choose; each field is the variable ``SYNCBN_<FIELD>``."""

    model_config = SettingsConfigDict(env_prefix="SYNCBN_", frozen=True, extra="ignore")

    data_dir: Path = Path(".syncbn")
    """Database, checkpoints, logs, lock and the local Ray head's state."""
    database_url: SecretStr | None = None
    """A PostgreSQL database, as postgresql://USER:PASSWORD@HOST:PORT/DATABASE, in place of the file in ``data_dir``."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8400
    """0 lets the system choose."""
    public_url: HttpUrl | None = None
    """Where workers reach this service; by default its own host and port."""
    api_token: SecretStr | None = None
    """The operator's key: who shows it as a bearer token is the principal ``admin``."""
    tls_cert: Path | None = None
    """Certificate chain (PEM) to serve HTTPS with, and beside it ``tls_key``, its private key."""
    tls_key: Path | None = None
    tls_terminated: bool = False
    """That something else before this service ends TLS; said by the operator, who alone can know."""
    trusted_proxies: str = ""
    """Addresses, with commas between, whose word on where a request comes from (X-Forwarded-For) is believed."""
    rate_limit: _Rate = "6000/minute"
    """Requests of one principal, where keys are asked for."""
    refusal_limit: _Rate = "30/minute"
    """Requests of one address without a right key."""
    send_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """How long a reader may take nothing of its answer, such as a stream, until its connection ends."""
    data_roots: Annotated[tuple[Path, ...] | None, NoDecode, BeforeValidator(_split)] = None
    """Folders, with colons between, that a job's ``idx:/FOLDER`` may lie in; see ``readable_roots``."""
    secrets_dir: Path | None = None
    """Folder with one file for each secret that webhooks are signed with, kept from everyone's eyes."""
    webhook_networks: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode, BeforeValidator(_split_at_commas)] = ()
    """Networks, as 10.1.0.0/16 with commas between, that webhooks may lead to beside the public internet."""
    keep_metrics_days: _Days = None
    """For how long after a job's end its metrics are kept, and so with its logs and its events' bodies."""
    keep_logs_days: _Days = None
    keep_events_days: _Days = None
    keep_audit_days: _Days = 365
    """For how long an entry of the audit trail is kept."""
    forget_every_hours: Annotated[float, Field(gt=0)] = 6
    """How often the service forgets what has been kept long enough."""
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
        """The SQLite file, which is used where there is no ``database_url``."""
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
        return _is_loopback(self.host)

    @property
    def exposed(self) -> bool:
        """Whether others than this machine reach the service, by its own address or by its public one."""
        behind_proxy = self.public_url is not None and not _is_loopback(self.public_url.host or "")
        return not self.loopback or behind_proxy

    @property
    def readable_roots(self) -> tuple[Path, ...] | None:
        """What jobs may read data from: ``data_roots``; without any everything (None) on loopback, else nothing."""
        if self.data_roots is not None:
            return self.data_roots
        return () if self.exposed else None

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("SYNCBN_TLS_CERT and SYNCBN_TLS_KEY go together: set both or neither")
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class ClientSettings(BaseSettings):
    """Which service the command line and the Python client talk to."""

    model_config = SettingsConfigDict(env_prefix="SYNCBN_", frozen=True, extra="ignore")

    url: HttpUrl = HttpUrl("http://127.0.0.1:8400")
    api_token: SecretStr | None = None
