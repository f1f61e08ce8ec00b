"""The network: who can reach the service, over what, how often, and where it may reach itself."""

import socket
import ssl
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

from service.client import Client
from service.doctor.finding import Finding, judge
from service.errors import ServiceError
from service.exposure import exposure_problems
from service.settings import ClientSettings, Settings

_DANGEROUS = {
    ip_address("127.0.0.1"): "this machine itself",
    ip_address("::1"): "this machine itself",
    ip_address("169.254.169.254"): "the cloud's metadata",
}


def look_at_network(settings: Settings, client_settings: ClientSettings, *, keys_made: bool) -> Iterator[Finding]:
    """Each check of it; ``keys_made`` tells of stored keys."""
    yield _exposure(settings, keys_made)
    if settings.tls_cert is not None and settings.tls_key is not None:
        yield _certificate(settings.tls_cert, settings.tls_key)
    if settings.trusted_proxies:
        yield _proxies(settings)
    yield _rates(settings)
    if settings.webhook_networks:
        yield _webhook_networks(settings)
    yield _port_or_service(settings, client_settings)


def _exposure(settings: Settings, keys_made: bool) -> Finding:
    keys = "keys asked for" if keys_made or settings.api_token is not None else "open to all who reach it"
    return judge("exposure", f"listens on {settings.host}, {keys}", *exposure_problems(settings, keys_made=keys_made))


def _certificate(cert: Path, key: Path) -> Finding:
    """Shake hands with itself: that needs the key to fit, and the certificate to be valid today."""
    server, client = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # whoever signed it is the callers' matter
    try:
        server.load_cert_chain(cert, key, password="")
        client.load_verify_locations(cert)
        _shake_hands(server, client)
    except (OSError, ssl.SSLError) as error:
        why = getattr(error, "verify_message", "") or error.strerror or str(error)
        remedy = (
            "SYNCBN_TLS_CERT takes the chain and SYNCBN_TLS_KEY its key, both PEM, readable, valid, without a password"
        )
        return judge("certificate", f"{cert} with {key}: {why}", remedy)
    return judge("certificate", f"{cert} fits its key and is valid today")


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        server.wrap_bio(to_server, to_client, server_side=True),
        client.wrap_bio(to_client, to_server, server_side=False),
    ]
    for _ in range(4):
        for end in list(ends):
            try:
                end.do_handshake()
                ends.remove(end)
            except ssl.SSLWantReadError:
                continue


def _proxies(settings: Settings) -> Finding:
    remedy = ""
    if "*" in settings.trusted_proxies and not settings.loopback:
        remedy = (
            "whoever connects may claim any address, and guess keys from ever new ones: name the proxies' addresses"
        )
    return judge("proxies", f"{settings.trusted_proxies} may say where requests come from", remedy)


def _rates(settings: Settings) -> Finding:
    """Told, not judged: nobody here knows how many services there are."""
    found = f"{settings.rate_limit} for a principal, {settings.refusal_limit} wrong keys for an address"
    if settings.database_url is not None:
        found += (
            "; each service counts for itself, so n of them let pass n times as many: set an nth of what shall hold"
        )
    return judge("rates", found)


def _webhook_networks(settings: Settings) -> Finding:
    networks = settings.webhook_networks
    open_to = dict.fromkeys(
        what for address, what in _DANGEROUS.items() if any(address in network for network in networks)
    )
    remedy = f"webhooks could reach {' and '.join(open_to)}: name smaller networks" if open_to else ""
    return judge("webhook networks", ", ".join(map(str, networks)), remedy)


def _port_or_service(settings: Settings, client_settings: ClientSettings) -> Finding:
    token = client_settings.api_token
    try:
        with Client(str(client_settings.url), token.get_secret_value() if token else None, timeout_s=3) as client:
            parts = client.ready()
    except ServiceError:
        return _port(settings)
    broken = {name: status for name, status in parts.items() if status != "ok"}
    found = f"answers at {client_settings.url}" + "".join(f"; {name}: {status}" for name, status in broken.items())
    return judge("service", found, "see what it names" if broken else "")


def _port(settings: Settings) -> Finding:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            found = f"{settings.host}:{settings.port} cannot be used: {error.strerror}"
            return judge(
                "port", found, "choose another with SYNCBN_PORT, or an address of this machine with SYNCBN_HOST"
            )
    return judge("port", f"{settings.port} is free; no service runs yet")
