"""A queue and a gate between the socket, which must never wait, and the application, which may."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

from .errors import MarqueeError

Item = TypeVar("Item")


class Queue(Generic[Item]):
    """Items for one reader. The owner bounds it. The error that ends it is raised after the last item."""

    def __init__(self) -> None:
        self.items: deque[Item] = deque()
        self._end: MarqueeError | None = None
        self._arrived = asyncio.Event()

    def put(self, items: Iterable[Item]) -> None:
        self.items.extend(items)
        self._arrived.set()

    def replace(self, item: Item) -> None:
        """Replace all waiting items by this one."""
        self.items.clear()
        self.put((item,))

    def end(self, error: MarqueeError) -> None:
        if self._end is None:
            self._end = error
            self._arrived.set()

    async def get(self) -> Item:
        """Wait for the next item and return it. Raises the error that ended the queue. Cancelling is safe."""
        while not self.items:
            if self._end is not None:
                raise self._end
            self._arrived.clear()
            await self._arrived.wait()
        return self.items.popleft()


class Gate:
    """An event that may also fail: those who wait then get the error."""

    def __init__(self) -> None:
        self._opened = asyncio.Event()
        self.error: MarqueeError | None = None

    def open(self) -> None:
        self._opened.set()

    def fail(self, error: MarqueeError) -> None:
        self.error = error
        self._opened.set()

    async def wait(self) -> None:
        """Wait until the gate is open. Raises the error with which it failed."""
        await self._opened.wait()
        if self.error is not None:
            raise self.error
