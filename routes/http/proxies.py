"""Who the client is behind proxies: only what a proxy of ours says of it is believed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from starlette.types import ASGIApp, Receive, Scope, Send

_SCHEMES = {"http": {"http": "http", "https": "https"}, "websocket": {"http": "ws", "https": "wss"}}


class TrustedProxies:
    """Makes the address before our proxies the client of the scope, and the scheme that it used the scope's.

    Each proxy appends to `X-Forwarded-For` who it heard from. So it is read from the right, for as long as those named
    are ours: what stands further left anybody may have written.
    """

    def __init__(self, app: ASGIApp, networks: Sequence[str]) -> None:
        self.app = app
        self._networks = [ip_network(each) for each in networks]
        self._trusts = lru_cache(maxsize=4_096)(self._is_ours)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and scope.get("client") is not None:
            peer = _address(scope["client"][0])
            if peer is not None and self._trusts(peer):
                scope = {**scope, **self._forwarded(scope, peer)}
        await self.app(scope, receive, send)

    def _forwarded(self, scope: Scope, peer: IPv4Address | IPv6Address) -> Scope:
        client = peer
        for text in reversed(_values(scope["headers"], b"x-forwarded-for")):
            address = _address(_without_port(text))
            if address is None:
                break  # "unknown", or nonsense: the last one that is known counts
            client = address
            if not self._trusts(address):
                break
        found: Scope = {} if client == peer else {"client": (str(client), 0)}
        schemes = _values(scope["headers"], b"x-forwarded-proto")
        if schemes and (scheme := _SCHEMES[scope["type"]].get(schemes[-1].lower())) is not None:
            found["scheme"] = scheme
        return found

    def _is_ours(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in network for network in self._networks)


def _values(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> list[str]:
    joined = b",".join(value for name, value in headers if name == wanted).decode("latin-1")
    return [part.strip() for part in joined.split(",") if part.strip()]


def _without_port(text: str) -> str:
    """Of `1.2.3.4:5678` and `[::1]:5678`; an IPv6 address without brackets has no port."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """None for what is no address. IPv4 that came over an IPv6 socket is IPv4."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
