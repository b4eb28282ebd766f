"""The client's address behind trusted proxies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_network

from starlette.types import ASGIApp, Receive, Scope, Send

from core.network.addresses import parse_address

_SCHEMES = {"http": {"http": "http", "https": "https"}, "websocket": {"http": "ws", "https": "wss"}}


class TrustedNetworks:
    """The networks of trusted proxies."""

    def __init__(self, networks: Sequence[str]) -> None:
        self._networks = [ip_network(each) for each in networks]
        self.include = lru_cache(maxsize=4_096)(self._include)

    def _include(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in network for network in self._networks)

    def contain(self, host: str) -> bool:
        """Return whether the host is an address in one of the networks."""
        address = parse_address(host)
        return address is not None and self.include(address)


class TrustedProxies:
    """Replaces the client and the scheme of the scope with the ones that the outermost trusted proxy received.

    Each proxy appends its peer's address to `X-Forwarded-For`. The header is therefore read from the right, up to the
    first address that is not a trusted proxy, because everything further left can be forged.
    """

    def __init__(self, app: ASGIApp, networks: Sequence[str]) -> None:
        self.app = app
        self._trusts = TrustedNetworks(networks).include

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and scope.get("client") is not None:
            peer = parse_address(scope["client"][0])
            if peer is not None and self._trusts(peer):
                scope = {**scope, **self._forwarded(scope, peer)}
        await self.app(scope, receive, send)

    def _forwarded(self, scope: Scope, peer: IPv4Address | IPv6Address) -> Scope:
        client = peer
        for text in reversed(_values(scope["headers"], b"x-forwarded-for")):
            address = parse_address(text)
            if address is None:
                break  # the value is "unknown" or malformed, so use the last known address
            client = address
            if not self._trusts(address):
                break
        found: Scope = {} if client == peer else {"client": (str(client), 0)}
        schemes = _values(scope["headers"], b"x-forwarded-proto")
        if schemes and (scheme := _SCHEMES[scope["type"]].get(schemes[-1].lower())) is not None:
            found["scheme"] = scheme
        return found


def _values(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> list[str]:
    joined = b",".join(value for name, value in headers if name == wanted).decode("latin-1")
    return [part.strip() for part in joined.split(",") if part.strip()]
