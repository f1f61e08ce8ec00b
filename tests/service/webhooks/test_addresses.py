import asyncio
from ipaddress import ip_address, ip_network

import pytest
from pydantic import HttpUrl

from service.webhooks.addresses import Address, AddressGuard, Refused, is_public, unwrapped

PUBLIC = ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "2a00:1450:4001:82a::200e", "::ffff:8.8.8.8"]

NOT_PUBLIC = [
    *("127.0.0.1", "127.9.9.9", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1", "::127.0.0.1"),
    *("10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "198.18.0.1", "::ffff:10.0.0.1"),
    *("fd00::1", "fc00::1", "fe80::1", "fec0::1", "169.254.1.1"),
    *("224.0.0.1", "239.1.1.1", "ff02::1", "255.255.255.255", "240.0.0.1"),
    *("192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "192.0.0.192", "3fff::1"),
    # Metadata of Amazon and others, of Amazon over IPv6, of Alibaba, and Azure's host.
    *("169.254.169.254", "fd00:ec2::254", "100.100.100.200", "168.63.129.16", "::ffff:169.254.169.254"),
    # IPv4 in disguise: 6to4, Teredo, NAT64.
    *("2002:7f00:1::1", "2002:a9fe:a9fe::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "64:ff9b::a9fe:a9fe"),
]


def judged(guard: AddressGuard, url: str) -> list[Address]:
    return asyncio.run(guard.addresses(HttpUrl(url), 20.0))


def test_only_machines_of_the_public_internet_are_public() -> None:
    assert [text for text in PUBLIC if not is_public(unwrapped(ip_address(text)))] == []
    assert [text for text in NOT_PUBLIC if is_public(unwrapped(ip_address(text)))] == []


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "0177.0.0.1", "169.254.169.254"],
)
def test_what_leads_to_no_public_address_is_refused_however_it_is_written(host: str) -> None:
    with pytest.raises(Refused, match=r"not on the public internet.*SYNCBN_WEBHOOK_NETWORKS"):
        judged(AddressGuard(), f"https://{host}/hook")


def test_a_network_that_the_operator_named_is_allowed_also_without_tls() -> None:
    guard = AddressGuard([ip_network("127.0.0.0/8")])
    for url in ("http://127.0.0.1:1/", "https://127.0.0.1/", "http://[::ffff:127.0.0.1]/", "http://localhost/"):
        assert judged(guard, url) == [ip_address("127.0.0.1")]
    for url in ("https://10.0.0.1/", "https://[::1]/"):
        with pytest.raises(Refused, match="nor in a network"):
            judged(guard, url)


def test_beyond_such_networks_only_https_is_spoken() -> None:
    assert judged(AddressGuard(), "https://8.8.8.8/") == [ip_address("8.8.8.8")]
    with pytest.raises(Refused, match=r"only https leads to 8\.8\.8\.8"):
        judged(AddressGuard(), "http://8.8.8.8/")


def test_a_name_without_an_address_is_refused() -> None:
    with pytest.raises(Refused, match=r"nowhere\.invalid does not resolve"):
        judged(AddressGuard(), "https://nowhere.invalid/")
