"""Watches whether a client takes the data that was written to its connection.

Rules:
- A connection whose client takes nothing for WRITE_SECONDS is aborted.
- If too many bytes wait for one client, or for all clients (`core.network.unsent`), connections are aborted, beginning
  with the one whose client has taken nothing for the longest time.
- A request on a connection with unread data starts when the client has taken that data, so that at most one response
  waits for each connection.
"""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import Callable
from contextlib import suppress
from struct import Struct
from termios import TIOCOUTQ
from typing import Any

import structlog
from uvicorn.protocols.http.flow_control import FlowControl

from core import metrics
from core.network.unsent import UnsentBytes
from realtime.fanout.subscription import SLOW_CLIENT_SECONDS
from server.gentle_transport import GentleTransport

# Longer than an event stream waits, so that the stream itself disconnects a slow client and logs the client's position.
WRITE_SECONDS = SLOW_CLIENT_SECONDS + 5.0
WRITE_CHECK_SECONDS = 2.5
_INT = Struct("i")

log = structlog.get_logger("unread_responses")


class WriteWatch:
    """Aborts the connection of a client that has taken no data for WRITE_SECONDS.

    A slow client that still takes some data may continue, unless too much data waits for its address. `client` is
    empty, or the address or network that the data is counted for.
    """

    def __init__(self, transport: GentleTransport, unsent: UnsentBytes[WriteWatch], client: str) -> None:
        self._transport = transport
        self._unsent = unsent
        self._client = client
        self._abort: Callable[[], None] | None = None
        self._last_write = 0
        self._timer: asyncio.TimerHandle | None = None
        self._untaken = 0  # The number of bytes that the client had not taken by `_taken_at`, when it last took any.
        self._taken_at = 0.0

    def start(self, abort: Callable[[], None]) -> None:
        """Begin to check that the client takes the written data. No more may be written until it has taken some.

        If the client takes none for WRITE_SECONDS, call `abort`. The object keeps it only while it checks, because a
        reference from the protocol to itself would leave each closed connection to the garbage collector.
        """
        self.stop()
        loop = asyncio.get_running_loop()
        self._untaken, self._taken_at = self._untaken_bytes(), loop.time()
        self._last_write = self._transport.last_write
        if self.buffered():
            self._abort = abort
            self._timer = loop.call_later(WRITE_CHECK_SECONDS, self._check)
            self._unsent.count(self._client, self)
            while watches := self._unsent.excess(self._client):
                min(watches, key=lambda watch: watch._taken_at)._end("unread", "unread response dropped")

    def stop(self) -> None:
        self._abort = None
        self._unsent.forget(self._client, self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def buffered(self) -> int:
        """Return how many bytes are kept in memory. uvloop keeps a whole write until its last byte is taken."""
        size = self._transport.get_write_buffer_size()
        return max(size, self._last_write) if size else 0

    def _check(self) -> None:
        loop = asyncio.get_running_loop()
        untaken, now = self._untaken_bytes(), loop.time()
        if untaken < self._untaken:
            self._untaken, self._taken_at = untaken, now
        if now - self._taken_at >= WRITE_SECONDS:
            self._end("slow", "slow client disconnected")
        else:
            self._timer = loop.call_later(WRITE_CHECK_SECONDS, self._check)

    def _end(self, reason: str, event: str) -> None:
        """Abort the connection, in the next turn of the event loop, because the transport may be in a write now."""
        metrics.HTTP_REFUSED.labels(reason).inc()
        address = (self._transport.get_extra_info("peername") or ("",))[0]
        log.info(event, address=address, untaken_bytes=self._untaken_bytes())
        if self._abort is not None:
            asyncio.get_running_loop().call_soon(self._abort)
        self.stop()

    def _untaken_bytes(self) -> int:
        """Return how many bytes the client has not acknowledged, as far as the operating system knows.

        The size of our own buffer would not be enough: the system's buffer holds megabytes, and it takes more data from
        our buffer only after it has sent a large part of its own.
        """
        queued = 0
        with suppress(OSError):
            (queued,) = _INT.unpack(
                fcntl.ioctl(self._transport.get_extra_info("socket").fileno(), TIOCOUTQ, bytes(_INT.size))
            )
        return self._transport.get_write_buffer_size() + queued


def once_taken(flow: FlowControl, app: Any) -> Any:
    """Return an ASGI application that calls `app` when the client has taken the data that was written before."""
    if not flow.write_paused:
        return app

    async def run(scope: Any, receive: Any, send: Any) -> None:
        await flow.drain()
        await app(scope, receive, send)

    return run
