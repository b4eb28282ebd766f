"""The client's address behind trusted proxies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_network

from starlette.types import ASGIApp, Receive, Scope, Send

from core.hosts import address_of

_SCHEMES = {"http": {"http": "http", "https": "https"}, "websocket": {"http": "ws", "https": "wss"}}


class TrustedProxies:
    """Replaces the client and the scheme of the scope with the ones that the outermost trusted proxy received.

    Each proxy appends its peer's address to `X-Forwarded-For`. The header is therefore read from the right, up to the
    first address that is not a trusted proxy: everything further left can be forged.
    """

    def __init__(self, app: ASGIApp, networks: Sequence[str]) -> None:
        self.app = app
        self._networks = [ip_network(each) for each in networks]
        self._trusts = lru_cache(maxsize=4_096)(self._is_trusted)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and scope.get("client") is not None:
            peer = address_of(scope["client"][0])
            if peer is not None and self._trusts(peer):
                scope = {**scope, **self._forwarded(scope, peer)}
        await self.app(scope, receive, send)

    def _forwarded(self, scope: Scope, peer: IPv4Address | IPv6Address) -> Scope:
        client = peer
        for text in reversed(_values(scope["headers"], b"x-forwarded-for")):
            address = address_of(_without_port(text))
            if address is None:
                break  # "unknown" or malformed: use the last known address
            client = address
            if not self._trusts(address):
                break
        found: Scope = {} if client == peer else {"client": (str(client), 0)}
        schemes = _values(scope["headers"], b"x-forwarded-proto")
        if schemes and (scheme := _SCHEMES[scope["type"]].get(schemes[-1].lower())) is not None:
            found["scheme"] = scheme
        return found

    def _is_trusted(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in network for network in self._networks)


def _values(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> list[str]:
    joined = b",".join(value for name, value in headers if name == wanted).decode("latin-1")
    return [part.strip() for part in joined.split(",") if part.strip()]


def _without_port(text: str) -> str:
    """Remove the port of `1.2.3.4:5678` and `[::1]:5678`; an IPv6 address without brackets has none."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text
