"""Divides long work, so that it never blocks the event loop for long.

`Slices` runs generators: all of them together work for about SLICE_SECONDS in each turn of the event loop. `PerTurn`
limits how many tasks continue in each turn.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator

import structlog

SLICE_SECONDS = 0.01  # all other clients may have to wait for a slice

log = structlog.get_logger("slices")


class Slices:
    """Runs work, each a generator that yields wherever it may be interrupted. Pieces between two yields must be short.

    Work that was interrupted continues after all other work that is waiting.
    """

    def __init__(self) -> None:
        self._waiting: deque[Iterator[None]] = deque()
        self._due: asyncio.Handle | None = None

    def add(self, work: Iterator[None]) -> None:
        """Begin the work in the next turn of the event loop. To cancel the work, close the generator."""
        self._waiting.append(work)
        if self._due is None:
            self._due = asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        until = time.perf_counter() + SLICE_SECONDS
        while self._waiting:
            work = self._waiting.popleft()
            try:
                for _ in work:
                    if time.perf_counter() >= until:
                        self._waiting.append(work)
                        self._due = asyncio.get_running_loop().call_soon(self._run)
                        return
            except Exception as error:
                log.error("work failed", exc_info=error)
        self._due = None


class PerTurn:
    """Lets at most `limit` tasks continue in each turn of the event loop, in the order in which they began to wait."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._left = limit
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._due: asyncio.Handle | None = None

    async def turn(self) -> None:
        """Wait until the caller may continue. Cancelling is safe."""
        loop = asyncio.get_running_loop()
        if self._due is None:
            self._due = loop.call_soon(self._begin_turn)
        if self._left and not self._waiting:
            self._left -= 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _begin_turn(self) -> None:
        self._left = self._limit
        while self._left and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # the task may have been cancelled
                turn.set_result(None)
                self._left -= 1
        is_used = self._left < self._limit
        self._due = asyncio.get_running_loop().call_soon(self._begin_turn) if is_used else None
