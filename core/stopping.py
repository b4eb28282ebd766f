"""The stop of this process: whether it has begun, and who is told.

Serving, then leaving (`/readyz` says so, everything is served as before, for load balancers to notice), then stopping
(what is open is brought to its end). There is no way back. Only used from the event loop.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType
from typing import Any

import structlog

GRACE_SECONDS = 1.0  # what is already on its way may still arrive

log = structlog.get_logger("stopping")


class Stopping:
    """One per process. Each of `on_stop` is called once, when the stop begins, and must not wait."""

    def __init__(self) -> None:
        self.is_leaving = False
        self.on_stop: list[Callable[[], None]] = []
        self._begun = asyncio.Event()
        self._limits: set[asyncio.Timeout] = set()

    @property
    def is_stopping(self) -> bool:
        return self._begun.is_set()

    def leave(self) -> None:
        """Be ready no more."""
        self.is_leaving = True

    def begin(self) -> None:
        """Bring what is open to its end. Again: nothing."""
        if self.is_stopping:
            return
        self.leave()
        self._begun.set()
        for limit in self._limits:
            _shorten(limit)
        for listener in self.on_stop:
            try:
                listener()
            except Exception as error:
                log.error("a listener of the stop failed", exc_info=error)

    async def wait(self) -> None:
        """Until the stop begins."""
        await self._begun.wait()

    @contextmanager
    def hearing_signals(self) -> Iterator[None]:
        """Begin at a signal to stop, beside whoever else handles it, and only where somebody does."""
        loop = asyncio.get_running_loop()
        others: dict[int, Any] = {}

        def hear(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self.begin)
            others[number](number, frame)

        if threading.current_thread() is threading.main_thread():
            for each in (signal.SIGTERM, signal.SIGINT):
                if callable(handler := signal.getsignal(each)):
                    others[each] = handler
                    signal.signal(each, hear)
        try:
            yield
        finally:
            for number, handler in others.items():
                if signal.getsignal(number) is hear:
                    signal.signal(number, handler)

    @asynccontextmanager
    async def timeout(self, seconds: float) -> AsyncIterator[None]:
        """As `asyncio.timeout`, and over soon after the stop has begun. Raises TimeoutError."""
        async with asyncio.timeout(seconds) as limit:
            self._limits.add(limit)
            if self.is_stopping:
                _shorten(limit)
            try:
                yield
            finally:
                self._limits.discard(limit)


def _shorten(limit: asyncio.Timeout) -> None:
    if limit.expired():  # what it held up is on its way out
        return
    soon = asyncio.get_running_loop().time() + GRACE_SECONDS
    due = limit.when()
    limit.reschedule(soon if due is None else min(due, soon))
