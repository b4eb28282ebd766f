"""Fairness between clients: one client may hold only some of the places that all clients share.

A client is an address or IPv6 network, as `core.network.addresses.network_of` returns it. The places themselves, such
as a pool of connections, are bounded elsewhere. A client that already holds its share waits only for one of its own
places, in order, so it does not delay other clients.
"""

from __future__ import annotations

import asyncio
from contextvars import ContextVar

# The client on whose behalf the current task works, or an empty string for the service itself and for clients that are
# not limited. A task inherits the client from the task that creates it.
CLIENT: ContextVar[str] = ContextVar("client", default="")


class Shares:
    """At most `size` places for each client. `async with shares.of(client)` waits for one of them and holds it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.clients: dict[str, _Share] = {}

    def of(self, client: str) -> _Share:
        """Return the client's share. For an empty `client`, it is unlimited."""
        return self.clients.get(client) or _Share(self, client)


class _Share:
    """The share of one client. `shares` keeps it only while a task uses it."""

    __slots__ = ("_client", "_free", "_shares", "_users")

    def __init__(self, shares: Shares, client: str) -> None:
        self._shares = shares
        self._client = client
        self._free = asyncio.Semaphore(shares.size)
        self._users = 0  # the tasks that hold a place or wait for one

    async def __aenter__(self) -> None:
        if not self._client:
            return
        self._shares.clients[self._client] = self
        self._users += 1
        try:
            await self._free.acquire()
        except BaseException:
            self._leave()
            raise

    async def __aexit__(self, *_: object) -> None:
        if self._client:
            self._free.release()
            self._leave()

    def _leave(self) -> None:
        self._users -= 1
        if not self._users:
            del self._shares.clients[self._client]
