"""Where messages may go: to addresses of the public internet, over TLS, and to networks that the operator has named.

Whoever makes a webhook chooses where the service connects to, and the service stands where they do not: beside
databases, other services and the cloud's metadata. So a name is resolved here, and the connection is then made to the
very address that was judged; a name that would resolve to something else a moment later gains nothing.
"""

import asyncio
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from pydantic import HttpUrl

KNOB = "SYNCBN_WEBHOOK_NETWORKS"

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_GLOBAL_UNICAST = IPv6Network("2000::/3")
"""All that is routed of IPv6 (RFC 4291, section 2.4); what leads to IPv4 in disguise lies elsewhere, or below."""

_NOT_PUBLIC = tuple(
    map(
        ip_network,
        (
            "192.0.0.0/24",  # of protocols (RFC 6890); some clouds tell metadata there. Not all Pythons know
            "192.88.99.0/24",  # relays of 6to4
            "168.63.129.16/32",  # Azure's host, which answers its guests at an address that looks public
            "2002::/16",  # 6to4, which leads to IPv4 in disguise
            "3fff::/20",  # for documents (RFC 9637)
        ),
    )
)

_MAX_ADDRESSES = 4


class Refused(Exception):
    """The URL leads nowhere that messages may go, or its name to no address at all."""


class AddressGuard:
    """Judges addresses; ``networks`` are allowed whatever they are, also without TLS."""

    def __init__(self, networks: Sequence[Network] = ()) -> None:
        self._networks = tuple(networks)

    async def addresses(self, url: HttpUrl, timeout_s: float) -> list[Address]:
        """Where a message for ``url`` may go, in the order to try.

        Raises: Refused where it may go to none of the addresses that the name has now, or they are not known within
            ``timeout_s``. It does not tell the addresses, which may be nobody's business.
        """
        assert url.host is not None
        found = await _resolve(url.host.strip("[]"), url.port or 0, timeout_s)
        plain = url.scheme == "http"
        good = [address for address in found if self._allows(address, plain=plain)]
        if good:
            return good[:_MAX_ADDRESSES]
        if plain and any(self._allows(address, plain=False) for address in found):
            raise Refused(f"only https leads to {url.host}; the service's operator can name networks in {KNOB}")
        text = f"{url.host} is not on the public internet, nor in a network that the service's operator has named"
        raise Refused(f"{text} in {KNOB}")

    def _allows(self, address: Address, *, plain: bool) -> bool:
        named = _in_any(address, self._networks)
        return named or (not plain and is_public(address))


def is_public(address: Address) -> bool:
    """Whether the address is of a machine on the public internet: one, and nobody's own."""
    if address.is_multicast or address.is_reserved or _in_any(address, _NOT_PUBLIC):
        return False
    return address.is_global and (isinstance(address, IPv4Address) or address in _GLOBAL_UNICAST)


def unwrapped(address: Address) -> Address:
    """The address that is really meant: of an IPv4 address written as IPv6 (``::ffff:a.b.c.d``) the former."""
    return getattr(address, "ipv4_mapped", None) or address


def _in_any(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks if network.version == address.version)


async def _resolve(host: str, port: int, timeout_s: float) -> list[Address]:
    """The addresses of a name or of a literal address. A resolver that hangs is left behind in a thread of its own."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[Address] | Exception] = loop.create_future()

    def tell(found: list[Address] | Exception) -> None:
        if not answer.done():
            answer.set_result(found)

    def look() -> None:
        found: list[Address] | Exception
        try:
            found = _look_up(host, port)
        except (OSError, ValueError) as error:  # ValueError: a name that cannot be encoded
            found = error
        with suppress(RuntimeError):  # the loop has ended meanwhile: nobody waits any more
            loop.call_soon_threadsafe(tell, found)

    threading.Thread(target=look, name="webhook-resolver", daemon=True).start()
    try:
        found = await asyncio.wait_for(answer, timeout_s)
    except TimeoutError:
        raise Refused(f"the name {host} was not resolved within {timeout_s:g} s") from None
    if isinstance(found, Exception):
        raise Refused(f"the name {host} does not resolve to any address")
    return found


def _look_up(host: str, port: int) -> list[Address]:
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(unwrapped(ip_address(entry[4][0])) for entry in entries))
