"""The shutdown of this process: its state and its listeners.

A process serves, then drains (`/readyz` reports not ready while requests are still served, so that load balancers
notice), then stops (open connections are closed and jobs are handed over). It never returns to an earlier
state. Not thread-safe: use it only from the event loop.
"""

from __future__ import annotations

import asyncio
import math
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType
from typing import Any

import structlog

GRACE_SECONDS = 1.0  # the time left for request bodies that are still arriving when the shutdown begins

log = structlog.get_logger("stopping")


class Stopping:
    """The shutdown state of a process. When the shutdown begins, each listener in `on_stop` is called once.

    Listeners must not block.
    """

    def __init__(self) -> None:
        self.is_draining = False
        self.on_stop: list[Callable[[], None]] = []
        self._begun = asyncio.Event()
        self._limits: set[asyncio.Timeout] = set()
        self.due = math.inf  # the time of the event loop when the grace of a shutdown that has begun ends

    @property
    def is_stopping(self) -> bool:
        return self._begun.is_set()

    def drain(self) -> None:
        """Report not ready from now on, but keep serving requests."""
        self.is_draining = True

    def begin(self) -> None:
        """Begin the shutdown: shorten the running timeouts and call the listeners. Further calls do nothing."""
        if self.is_stopping:
            return
        self.drain()
        self.due = asyncio.get_running_loop().time() + GRACE_SECONDS
        self._begun.set()
        for limit in self._limits:
            _shorten(limit)
        for listener in self.on_stop:
            try:
                listener()
            except Exception as error:
                log.error("shutdown listener failed", exc_info=error)

    async def wait(self) -> None:
        """Wait until the shutdown begins."""
        await self._begun.wait()

    @contextmanager
    def begin_on_signals(self) -> Iterator[None]:
        """Within the block, begin the shutdown on SIGTERM and SIGINT, then call the handler that was installed before.

        Signals without a Python handler are left unchanged. Outside the main thread, no handler is installed.
        """
        loop = asyncio.get_running_loop()
        others: dict[int, Any] = {}

        def on_signal(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self.begin)
            others[number](number, frame)

        if threading.current_thread() is threading.main_thread():
            for each in (signal.SIGTERM, signal.SIGINT):
                if callable(handler := signal.getsignal(each)):
                    others[each] = handler
                    signal.signal(each, on_signal)
        try:
            yield
        finally:
            for number, handler in others.items():
                if signal.getsignal(number) is on_signal:
                    signal.signal(number, handler)

    @asynccontextmanager
    async def timeout(self, seconds: float) -> AsyncIterator[None]:
        """Limit the block to `seconds`. When the shutdown begins, at most GRACE_SECONDS remain. Raises TimeoutError."""
        async with asyncio.timeout(seconds) as limit:
            self._limits.add(limit)
            if self.is_stopping:
                _shorten(limit)
            try:
                yield
            finally:
                self._limits.discard(limit)


def _shorten(limit: asyncio.Timeout) -> None:
    if limit.expired():  # the block is already being cancelled
        return
    soon = asyncio.get_running_loop().time() + GRACE_SECONDS
    due = limit.when()
    limit.reschedule(soon if due is None else min(due, soon))
