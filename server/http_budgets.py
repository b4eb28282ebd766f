"""Limits for the input of an HTTP connection, and the objects that count it and the time it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

# Input is parsed in small pieces, because all requests that end in one piece are parsed and queued together.
PIECE_BYTES = 1024
MAX_WAITING_BYTES = 64 * 1024  # When more input than this waits for a response, reading is paused.
HALF_CLOSED_SECONDS = 2.0  # Longer than most responses take; a costly read must not outlive its client for long.
# How long a request waits for its body before it starts. Most bodies arrive sooner. A request that starts with its
# whole body identifies its client only once.
BODY_HEADSTART_SECONDS = 0.01

# Some clients send their whole body before they read the response. These limits allow for a picture that is uploaded
# over a slow connection.
LINGER_SECONDS = 30.0
LINGER_BYTES = 64 * 1024 * 1024
LINGER_QUIET_SECONDS = 5.0  # After this long without a byte, no more input is expected.
SHORT_LINGER_SECONDS = 1.0  # Replaces LINGER_SECONDS for a connection beyond the limits, and when the service stops.

# A body may have 1,000 chunks, and one more for every 16 bytes. Clients that send each row as a chunk send 50 to 100
# bytes at a time.
MIN_CHUNK_BYTES = 16
CHUNK_CREDIT_BYTES = 1_000 * MIN_CHUNK_BYTES


class SmallChunks(Exception):
    """A body with too many small chunks."""


class ChunkCredit:
    """By how many bytes a body may still fall below MIN_CHUNK_BYTES for each chunk."""

    def __init__(self) -> None:
        self._bytes = CHUNK_CREDIT_BYTES

    @property
    def is_spent(self) -> bool:
        return self._bytes < 0

    def begin_chunk(self) -> None:
        """Count a chunk. Raises SmallChunks if the credit is spent."""
        self._bytes -= MIN_CHUNK_BYTES
        if self._bytes < 0:
            raise SmallChunks

    def add(self, size: int) -> None:
        """Count `size` bytes of the body."""
        self._bytes += size


class DiscardBudget:
    """How much more input may be discarded: LINGER_BYTES in total, until `seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self._until = asyncio.get_running_loop().time() + seconds
        self._bytes = LINGER_BYTES

    def spend(self, size: int) -> float:
        """Count `size` bytes. Return how many seconds to wait for more input: zero or less if the budget is spent."""
        self._bytes -= size
        if self._bytes < 0:
            return 0.0
        return min(self._until - asyncio.get_running_loop().time(), LINGER_QUIET_SECONDS)


class Deadline:
    """A timer of which only the latest start counts."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_running(self) -> bool:
        return self._timer is not None

    def start(self, seconds: float, expire: Callable[[], None]) -> None:
        """Call `expire` in `seconds`, unless `stop` or `start` is called before."""
        self.stop()
        self._timer = self._loop.call_later(seconds, self._expire, expire)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self, expire: Callable[[], None]) -> None:
        self._timer = None
        expire()


class Headstart:
    """Lets a body arrive, for at most BODY_HEADSTART_SECONDS, before its request starts.

    A request starts at once if its client waits for permission to send the body (`Expect`), if reading is paused until
    the application reads the body, or if it is a GET request, which usually has no body.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._cycle: RequestResponseCycle | None = None  # the request that waits for its body
        self._start: Callable[[], None] = lambda: None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, cycle: RequestResponseCycle, start: Callable[[], None]) -> None:
        """Call `start` when `end` is called, at the latest in BODY_HEADSTART_SECONDS; or now if no body will arrive."""
        if not cycle.more_body or cycle.waiting_for_100_continue or cycle.scope["method"] == "GET":
            start()
            return
        self._cycle, self._start = cycle, start
        self._timer = self._loop.call_later(BODY_HEADSTART_SECONDS, self.end)

    def end(self) -> None:
        """Start the request now, unless it has started."""
        if self._cycle is not None:
            start = self._start
            self._clear()
            start()

    def drop(self) -> None:
        """Forget the request if it has not started. It never will."""
        if self._cycle is not None:
            self._cycle.on_response = lambda: None  # it refers to the protocol, which refers to the request
            self._clear()

    def _clear(self) -> None:
        self._cycle, self._start = None, lambda: None
        if self._timer is not None:
            self._timer.cancel()
