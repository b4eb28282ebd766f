"""Watches whether a client takes the data that was written to its connection."""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import Callable
from contextlib import suppress
from struct import Struct
from termios import TIOCOUTQ

import structlog

from core import metrics
from realtime.fanout.subscription import SLOW_CLIENT_SECONDS

# Longer than an event stream waits, so that the stream itself disconnects a slow client and logs the client's position.
WRITE_SECONDS = SLOW_CLIENT_SECONDS + 5.0
WRITE_CHECK_SECONDS = 2.5
_INT = Struct("i")

log = structlog.get_logger("unread_responses")


class WriteWatch:
    """Aborts the connection of a client that has taken no data for WRITE_SECONDS.

    A slow client that still takes some data may continue.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
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
        if self._transport.get_write_buffer_size():
            self._timer = loop.call_later(WRITE_CHECK_SECONDS, self._check, abort)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self, abort: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        untaken, now = self._untaken_bytes(), loop.time()
        if untaken < self._untaken:
            self._untaken, self._taken_at = untaken, now
        if now - self._taken_at >= WRITE_SECONDS:
            metrics.HTTP_REFUSED.labels("slow").inc()
            address = (self._transport.get_extra_info("peername") or ("",))[0]
            log.info("slow client disconnected", address=address, untaken_bytes=untaken)
            abort()
        else:
            self._timer = loop.call_later(WRITE_CHECK_SECONDS, self._check, abort)

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
