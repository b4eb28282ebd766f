"""The limits on the number of HTTP connections of this process, in total and per address.

A connection is counted from the moment it is accepted until it is closed or becomes a websocket. Websockets are counted
by `realtime.sockets.places`. A connection whose websocket handshake is rejected is counted again until it is closed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import structlog
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from core import metrics
from core.network.addresses import network_of
from core.network.unsent import UnsentBytes
from server.unread_responses import WriteWatch

# At most this many refused connections stay open for a moment, so that their clients receive the response.
MAX_LINGERING_REFUSALS = 100
# The minimum time between two warnings about refused connections.
WARN_SECONDS = 60.0

log = structlog.get_logger("http_connections")


class HttpConnections:
    """The HTTP connections of a process. `is_trusted` returns whether an address belongs to a proxy. A proxy has no
    limit per address, because its connections come from many clients.
    """

    def __init__(
        self,
        *,
        max_connections: int,
        max_per_address: int | None,
        is_trusted: Callable[[str], bool],
    ) -> None:
        self._max_connections = max_connections
        self._max_per_address = max_per_address
        self._is_trusted = is_trusted
        self.unsent: UnsentBytes[WriteWatch] = UnsentBytes()
        self._by_network: Counter[str] = Counter()
        self._total = 0
        self._lingering = 0
        self._refused = 0  # the number of refusals since the last warning
        self._warned_at = -WARN_SECONDS

    def __len__(self) -> int:
        return self._total

    def enter(self, address: str) -> str | None:
        """Count a connection until `leave` is called. Return the reason if the connection is refused, else None."""
        network = network_of(address)
        reason = self._reason_against(network, address)
        if reason is not None:
            self._warn(network, reason)
            return reason
        self._by_network[network] += 1
        self._total += 1
        metrics.HTTP_CONNECTIONS.inc()
        return None

    def _reason_against(self, network: str, address: str) -> str | None:
        if len(self) >= self._max_connections:
            return "Too many connections"
        limit = self._max_per_address
        if limit is not None and self._by_network[network] >= limit and not self._is_trusted(address):
            return f"Too many connections from {network}"
        return None

    def client_of(self, address: str) -> str:
        """Return the network that unread responses are counted for. It is empty if the address has no limits."""
        return "" if self._max_per_address is None or self._is_trusted(address) else network_of(address)

    def _warn(self, network: str, reason: str) -> None:
        """Log a refusal, but at most once per WARN_SECONDS, because there may be thousands of refusals."""
        self._refused += 1
        now = time.monotonic()
        if now - self._warned_at >= WARN_SECONDS:
            settings = "MAX_HTTP_CONNECTIONS, MAX_HTTP_CONNECTIONS_PER_ADDRESS, TRUSTED_PROXIES"
            log.warning("connections refused", reason=reason, network=network, number=self._refused, settings=settings)
            self._refused, self._warned_at = 0, now

    def leave(self, address: str) -> None:
        """Stop counting a connection that `enter` has counted."""
        network = network_of(address)
        self._by_network[network] -= 1
        self._total -= 1
        if not self._by_network[network]:
            del self._by_network[network]
        metrics.HTTP_CONNECTIONS.dec()

    def may_linger(self) -> bool:
        """Return whether a refused connection may stay open until its client has received the response.

        If so, the connection is counted until `lingered` is called.
        """
        if self._lingering >= MAX_LINGERING_REFUSALS:
            return False
        self._lingering += 1
        return True

    def lingered(self) -> None:
        self._lingering -= 1


class Place:
    """The place of one connection: it is counted, or refused and kept open for its response, until `leave` is called.

    `refusal` is the reason if the connection is refused, else None. `is_open` is whether the connection may stay open.
    """

    def __init__(self, connections: HttpConnections, address: str) -> None:
        self._connections = connections
        self._address = address
        self.refusal = connections.enter(address)
        self.is_open = self.refusal is None or connections.may_linger()

    def leave(self) -> None:
        """Stop counting the connection. Idempotent."""
        if not self.is_open:
            return
        self.is_open = False
        if self.refusal is None:
            self._connections.leave(self._address)
        else:
            self._connections.lingered()


def disconnect(request: RequestResponseCycle) -> None:
    """Tell the application that the client of a request has disconnected, or will get another response."""
    request.disconnected = True
    request.message_event.set()
