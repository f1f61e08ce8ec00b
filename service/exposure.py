"""Whether the service may listen where it is told to: beyond its own machine only with keys, and only over TLS."""

from service.errors import ServiceError
from service.settings import Settings

MIN_TOKEN_LENGTH = 16
"""Characters of SYNCBN_API_TOKEN beyond loopback; the remedy makes 64."""


class Exposed(ServiceError):
    """The settings would open the service to whoever reaches its address."""

    code = "exposed"
    title = "The service would be exposed"


def refuse_exposure(settings: Settings, *, keys_made: bool) -> None:
    """Return if it is safe to listen. Raises: Exposed, with every remedy; ``keys_made`` tells of stored keys."""
    problems = exposure_problems(settings, keys_made=keys_made)
    if problems:
        where = settings.host if not settings.loopback else f"{settings.host}, reached as {settings.public_url},"
        raise Exposed(f"refusing to listen on {where}: {'; '.join(problems)}. Or listen on 127.0.0.1 alone")


def exposure_problems(settings: Settings, *, keys_made: bool) -> list[str]:
    """What must change before the service may be reached from other machines; nothing need on loopback."""
    if not settings.exposed:
        return []
    problems = []
    token = settings.api_token.get_secret_value() if settings.api_token else ""
    if not token and not keys_made:
        problems.append(
            "anyone there could run jobs: make a key with `syncbn keys create --principal NAME --role admin`, "
            "or set SYNCBN_API_TOKEN"
        )
    elif token and len(token) < MIN_TOKEN_LENGTH:
        problems.append(
            f"SYNCBN_API_TOKEN has only {len(token)} characters and could be guessed: take `openssl rand -hex 32`"
        )
    if settings.tls_cert is None and not settings.tls_terminated:
        problems.append(
            "keys would cross the network readable to all: set SYNCBN_TLS_CERT and SYNCBN_TLS_KEY, or "
            "SYNCBN_TLS_TERMINATED=true where a proxy or an encrypted network before the service sees to it"
        )
    return problems
