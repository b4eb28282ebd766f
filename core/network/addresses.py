"""Client addresses: how they are parsed, and which addresses count as one client. No I/O.

Every limit per address uses the result of `network_of`, so that all limits agree on what counts as one client.
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

IPV6_NETWORK_BITS = 64  # an internet customer gets at least a /64 network, so all addresses in it count as one client


def parse_address(text: str) -> IPv4Address | IPv6Address | None:
    """Parse `1.2.3.4`, `1.2.3.4:5678`, `::1`, `[::1]:5678` or `fe80::1%eth0`. Return None for anything else.

    A port and a zone are ignored. An IPv4-mapped IPv6 address is returned as IPv4.
    """
    host = text.strip().strip('"')
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]  # an IPv6 address without brackets has no port
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


@lru_cache(maxsize=10_000)
def network_of(host: str) -> str:
    """Return an IPv4 address itself, or the /64 network of an IPv6 address, because one client controls all of it.

    A string that is not an address, such as the name of a Unix socket, is returned unchanged.
    """
    address = parse_address(host)
    if address is None:
        return host
    if isinstance(address, IPv4Address):
        return str(address)
    return str(ip_network((address, IPV6_NETWORK_BITS), strict=False))
