"""The queues and gates between the socket, which must never wait, and the application, which may wait."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Generic, Self, TypeVar

from .errors import ClientClosed, MarqueeError

Item = TypeVar("Item")


class Queue(Generic[Item]):
    """Items for one reader. The owner limits their number. If an error ends the queue, it follows the last item."""

    def __init__(self) -> None:
        self.items: deque[Item] = deque()
        self._end: MarqueeError | None = None
        self._arrived = asyncio.Event()

    def put(self, items: Iterable[Item]) -> None:
        self.items.extend(items)
        self._arrived.set()

    def replace(self, item: Item) -> None:
        """Replace all waiting items with this one."""
        self.items.clear()
        self.put((item,))

    def end(self, error: MarqueeError) -> None:
        if self._end is None:
            self._end = error
            self._arrived.set()

    async def get(self) -> Item | None:
        """Wait for the next item and return it, or None after a `close`. Raises any other error that ended the queue.

        Cancelling is safe.
        """
        while not self.items:
            if isinstance(self._end, ClientClosed):
                return None
            if self._end is not None:
                raise self._end
            self._arrived.clear()
            await self._arrived.wait()
        return self.items.popleft()


class Gate:
    """An asyncio event that may also fail, in which case its waiters receive the error."""

    def __init__(self) -> None:
        self._opened = asyncio.Event()
        self.error: MarqueeError | None = None

    def open(self) -> None:
        self._opened.set()

    def fail(self, error: MarqueeError) -> None:
        self.error = error
        self._opened.set()

    async def wait(self) -> None:
        """Wait until the gate is open. Raises the gate's error if the gate fails."""
        await self._opened.wait()
        if self.error is not None:
            raise self.error


class Opened:
    """The base class of what the application opens on a client: a watch, a view or a presence.

    Each of them begins when it is first used or entered with `async with`.
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin = begin  # `begin()` connects the client
        self._ready = Gate()
        self._is_open = False

    async def __aenter__(self) -> Self:
        self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def ready(self) -> None:
        """Wait until the watch, view or presence is ready. Raises the error that ended it.

        A watch is ready when the server has accepted it, so that all later events arrive; a view, when its first
        snapshot has arrived; a presence, when its first state has arrived.
        """
        self._open()
        await self._ready.wait()

    def close(self) -> None:
        raise NotImplementedError

    def _start(self) -> None:
        """Register this watch, view or presence with the session."""
        raise NotImplementedError

    def _open(self) -> None:
        if not self._is_open:
            self._is_open = True
            self._begin()
            self._start()
