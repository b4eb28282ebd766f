"""The hosts that requests may name: the check against DNS rebinding. No I/O.

A malicious page can make its own domain resolve to 127.0.0.1 and then read the responses of this service as if they
came from its origin. Such requests name that domain in `Host`, so only known names are served. An IP address in `Host`
did not come from DNS and cannot be rebound: it is allowed if the service listens on every address of the machine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

from core.texts.shortened import shortened

MAX_HOST_LENGTH = 255  # the maximum length of a domain name (RFC 1035, section 2.3.4)
ANY_HOST = "*"
UNSPECIFIED = frozenset({"0.0.0.0", "::"})  # noqa: S104 (compared, not bound)
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([A-Za-z0-9._-]+))(?::[0-9]{0,5})?")
_PATTERN = re.compile(r"(?:\*\.)?[a-z0-9._-]+|\[[0-9a-f:.]{2,45}\]|[0-9a-f:.]{2,45}")


@lru_cache(maxsize=1_024)
def host_of(header: str) -> str | None:
    """Return the host of a `Host` header in lowercase, without port, brackets or final dot, or None if malformed."""
    found = _HOST.fullmatch(header) if len(header) <= MAX_HOST_LENGTH + 8 else None
    if found is None:
        return None
    if found[1] is not None:
        address = address_of(found[1])
        return str(address) if address is not None else None
    return normal(found[2])


def normal(name: str) -> str:
    """Return the normal form of a host, which is used to compare hosts."""
    name = name.lower().removesuffix(".")
    address = address_of(name)
    return str(address) if address is not None else name


def address_of(name: str) -> IPv4Address | IPv6Address | None:
    """Return the IP address that `name` represents, or None. An IPv4-mapped address is returned as IPv4."""
    try:
        found = ip_address(name)
    except ValueError:
        return None
    return (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found


def parse_pattern(text: str) -> str:
    """Return an entry of ALLOWED_HOSTS in its normal form. Raises ValueError."""
    lowered = text.lower()
    if lowered == ANY_HOST:
        return lowered
    if not _PATTERN.fullmatch(lowered) or len(lowered) > MAX_HOST_LENGTH:
        raise ValueError("expected host names such as example.org, without a scheme or port")
    return normal(lowered.removeprefix("[").removesuffix("]"))


@dataclass(frozen=True)
class AllowedHosts:
    """The hosts that requests may name. A pattern is a host, `*.example.org` for subdomains, or `*` for all hosts."""

    patterns: frozenset[str]
    allows_addresses: bool  # whether requests may name any IP address

    @property
    def allows_all(self) -> bool:
        return ANY_HOST in self.patterns

    def allow(self, host: str) -> bool:
        """Return whether requests to `host`, in the form that `host_of` returns, are served."""
        if self.allows_all or host in self.patterns or host == "localhost" or host.endswith(".localhost"):
            return True
        address = address_of(host)
        if address is not None:
            return address.is_loopback or self.allows_addresses
        labels = host.split(".")
        return any(f"*.{'.'.join(labels[start:])}" in self.patterns for start in range(1, len(labels)))


def origin_refusal(origin: str, host: str | None) -> str:
    """Return a message that states why an origin is rejected and what an operator can do about it."""
    shown, own = shortened(origin, MAX_HOST_LENGTH), shortened(host or "", MAX_HOST_LENGTH)
    return (
        f"The origin {shown} is not allowed. If its pages may use this service, add it to the setting ALLOWED_ORIGINS. "
        f"If it is this service's own origin, set PUBLIC_URL, or make the proxy keep the Host header (got {own!r})"
    )
