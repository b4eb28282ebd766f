"""Turns for costly work: few tasks work at a time, and clients whose tasks wait take turns."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """At most `total` turns at a time, of which one client has at most `per_client`.

    The tasks of one client get their turns in the order in which they came. Of the clients that wait, the one that had
    a turn least recently is next, so a client with many waiting tasks delays another client only by its running ones.
    """

    def __init__(self, total: int, per_client: int) -> None:
        self._free = total
        self._per_client = per_client
        self._running: Counter[int] = Counter()
        # The waiting tasks of each client, oldest first. The first client that may have another turn is the next one.
        self._waiting: dict[int, deque[asyncio.Future[None]]] = {}

    @property
    def waiting(self) -> int:
        """The number of tasks that wait."""
        return sum(map(len, self._waiting.values()))

    @asynccontextmanager
    async def of(self, client: int) -> AsyncIterator[None]:
        """Wait for a turn of the client, and have it until the context ends. A cancelled wait leaves the queue."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        self._grant()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._end(client)
            else:
                self._forget(client, turn)

    def _grant(self) -> None:
        while self._free:
            client = next((each for each in self._waiting if self._running[each] < self._per_client), None)
            if client is None:
                return
            turn = self._waiting[client].popleft()
            if turn.cancelled():  # its task has not run since
                self._drop_if_empty(client)
                continue
            self._to_the_end(client)
            self._free -= 1
            self._running[client] += 1
            turn.set_result(None)

    def _end(self, client: int) -> None:
        self._free += 1
        self._running[client] -= 1
        self._running = +self._running
        if client in self._waiting:
            self._to_the_end(client)
        self._grant()

    def _forget(self, client: int, turn: asyncio.Future[None]) -> None:
        if turn in self._waiting.get(client, ()):
            self._waiting[client].remove(turn)
            self._drop_if_empty(client)

    def _to_the_end(self, client: int) -> None:
        """Let the other waiting clients go first."""
        self._waiting[client] = self._waiting.pop(client)
        self._drop_if_empty(client)

    def _drop_if_empty(self, client: int) -> None:
        if not self._waiting[client]:
            del self._waiting[client]
