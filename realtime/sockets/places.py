"""The limits on connections (in total and per address), on subscriptions (per address), on filter conditions (per
address and per socket), and on what waits for the sockets of an address (`core.network.unsent`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from core.errors import TooManyRequests, Unavailable
from core.filters import Filter
from core.network.addresses import network_of
from core.network.shares import Shares
from core.network.unsent import Buffer, UnsentBytes

RETRY_AFTER_SECONDS = 5
# The limit for all filters of one socket. Each condition costs about 0.1 µs for every row that changes.
MAX_CONDITIONS_PER_SOCKET = 1_000
# The limit for the distinct filters of all sockets from one address, in one worker. Equal filters are evaluated once.
MAX_CONDITIONS_PER_ADDRESS = 10_000
# The limit for the subscriptions of all sockets from one address, in one worker. However equal they are, each event is
# written once for each of them.
MAX_SUBSCRIPTIONS_PER_ADDRESS = 4_000
# The limit for REST calls that run at the same time. Each may return `rest_calls.MAX_REPLY_BYTES`.
MAX_CALLS_PER_ADDRESS = 64


class TooMany(Exception):
    """A limit on subscriptions or conditions is exceeded. The message names the limit."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(eq=False, slots=True)
class _Network:
    """The connections and subscriptions of one address or IPv6 network, and the subscriptions with each filter."""

    connections: int = 0
    subscriptions: int = 0
    filters: Counter[tuple[str, Filter]] = field(default_factory=Counter)
    conditions: int = 0  # the number of conditions in all distinct filters


Filters = Iterable[tuple[str, Filter]]  # filters with their topics


class Place:
    """One counted connection, with its subscriptions and the conditions of their filters.

    `client` is the address or network of the connection, or an empty string if there are no limits per address.
    """

    def __init__(self, address: str, client: str, network: _Network, max_per_address: int | None) -> None:
        self.address = address
        self.client = client
        self._network = network
        self._max_per_address = max_per_address
        self._conditions = 0

    def hold(self, filters: Filters) -> None:
        """Count a subscription and its filters.

        Raises TooMany and counts nothing when a limit is exceeded.
        """
        if self._max_per_address is not None and self._network.subscriptions >= MAX_SUBSCRIPTIONS_PER_ADDRESS:
            raise TooMany(
                "too_many_subscriptions",
                f"Expected at most {MAX_SUBSCRIPTIONS_PER_ADDRESS:,} subscriptions of all sockets from one address",
            )
        filters = tuple(filters)
        wanted = sum(each.size for _, each in filters)
        if self._conditions + wanted > MAX_CONDITIONS_PER_SOCKET:
            raise TooMany(
                "too_many_conditions",
                f"Expected at most {MAX_CONDITIONS_PER_SOCKET:,} conditions in all filters of one socket, where a "
                f"filter counts once for each of its topics; got {self._conditions + wanted:,}",
            )
        new = sum(key[1].size for key in filters if key not in self._network.filters)
        if self._max_per_address is not None and self._network.conditions + new > self._max_per_address:
            raise TooMany(
                "too_many_conditions",
                f"Expected at most {self._max_per_address:,} conditions in the different filters of all sockets from "
                f"one address, got {self._network.conditions + new:,}",
            )
        self._network.subscriptions += 1
        self._conditions += wanted
        self._network.conditions += new
        self._network.filters.update(filters)

    def release(self, filters: Filters) -> None:
        """Stop counting a subscription and its filters."""
        self._network.subscriptions -= 1
        counted = self._network.filters
        for key in filters:
            self._conditions -= key[1].size
            counted[key] -= 1
            if not counted[key]:
                del counted[key]
                self._network.conditions -= key[1].size


class Places:
    """One per process. Without `max_per_address`, there are no limits per address."""

    def __init__(self, *, max_connections: int, max_per_address: int | None) -> None:
        self.is_closed = False
        self.unsent: UnsentBytes[Buffer] = UnsentBytes()
        self.calls = Shares(MAX_CALLS_PER_ADDRESS)
        self._max_connections = max_connections
        self._max_per_address = max_per_address
        self._networks: dict[str, _Network] = {}
        self._connections = 0

    def __len__(self) -> int:
        return self._connections

    @property
    def limits_addresses(self) -> bool:
        """Whether there are limits per address."""
        return self._max_per_address is not None

    def close(self) -> None:
        """Accept no further connections."""
        self.is_closed = True

    @contextmanager
    def take(self, address: str) -> Iterator[Place]:
        """Count a connection until the context ends. Raises Unavailable or TooManyRequests when a limit is exceeded."""
        if self.is_closed:
            raise Unavailable("The service is stopping")
        if self._connections >= self._max_connections:
            raise Unavailable("Too many connections")
        name = network_of(address)
        network = self._networks.setdefault(name, _Network())
        if self._max_per_address is not None and network.connections >= self._max_per_address:
            raise TooManyRequests(f"Too many connections from {name}", RETRY_AFTER_SECONDS)
        network.connections += 1
        self._connections += 1
        try:
            if self._max_per_address is None:
                yield Place(address, "", network, None)
            else:
                yield Place(address, name, network, MAX_CONDITIONS_PER_ADDRESS)
        finally:
            self._connections -= 1
            network.connections -= 1
            if not network.connections:
                del self._networks[name]
