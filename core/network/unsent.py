"""How many bytes wait in this process until clients take them: limits for each client, and for all clients together.

A client is an address or IPv6 network, as `core.network.addresses.network_of` returns it, or an empty string for
clients that have no limit of their own. Only buffers that hold much data need to be counted, so counting costs nothing
while clients read.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection
from typing import Generic, Protocol, TypeVar

MAX_CLIENT_BYTES = 64 * 1024 * 1024
MAX_BYTES = 256 * 1024 * 1024
# When MAX_BYTES is reached, this many bytes may still wait for each client, so that others cannot shut it out.
GUARANTEED_BYTES = 1024 * 1024
RECOUNT_SECONDS = 0.1


class Buffer(Protocol):
    """Data that waits for one client."""

    def buffered(self) -> int:
        """Return the number of waiting bytes."""


B = TypeVar("B", bound=Buffer)


class UnsentBytes(Generic[B]):
    """The buffers of all clients, with their sizes when they were last counted."""

    def __init__(self) -> None:
        self.total = 0
        self._buffers: dict[str, dict[B, int]] = {}
        self._sizes: Counter[str] = Counter()
        self._recounted_at: dict[str, float] = {}

    def count(self, client: str, buffer: B) -> None:
        """Note how much the buffer holds now. It stays counted until `forget` is called."""
        self._set(client, buffer, buffer.buffered())

    def forget(self, client: str, buffer: B) -> None:
        """Stop counting the buffer. Idempotent."""
        self._set(client, buffer, 0)

    def is_full(self, client: str) -> bool:
        """Return whether the client must take some of its data before it gets more."""
        if not (client and self._is_beyond(client)):
            return False
        now = time.monotonic()
        if now - self._recounted_at.get(client, -RECOUNT_SECONDS) >= RECOUNT_SECONDS:
            self._recount(client)
            if client in self._buffers:
                self._recounted_at[client] = now
        return self._is_beyond(client)

    def excess(self, client: str) -> Collection[B]:
        """Return the buffers of which one must be dropped because a limit is exceeded, or none if no limit is.

        These are the buffers of `client` or, if there are too many bytes in total, of the client that has the most.
        """
        if not (self._is_above_own_limit(client) or self.total > MAX_BYTES):
            return ()
        for each in list(self._buffers):
            self._recount(each)
        if self._is_above_own_limit(client):
            return self._buffers[client]
        if self.total > MAX_BYTES:
            return self._buffers[max(self._sizes, key=self._sizes.__getitem__)]
        return ()

    def _is_above_own_limit(self, client: str) -> bool:
        return bool(client) and self._sizes[client] > MAX_CLIENT_BYTES

    def _is_beyond(self, client: str) -> bool:
        size = self._sizes[client]
        return size > MAX_CLIENT_BYTES or (self.total > MAX_BYTES and size > GUARANTEED_BYTES)

    def _recount(self, client: str) -> None:
        for buffer in list(self._buffers.get(client, ())):
            self.count(client, buffer)

    def _set(self, client: str, buffer: B, size: int) -> None:
        buffers = self._buffers.get(client, {})
        change = size - buffers.get(buffer, 0)
        if not (change or buffers):
            return
        self.total += change
        self._sizes[client] += change
        if size:
            buffers[buffer] = size
            self._buffers[client] = buffers
            return
        buffers.pop(buffer, None)
        if not buffers:
            self._buffers.pop(client, None)
            self._recounted_at.pop(client, None)
            del self._sizes[client]
