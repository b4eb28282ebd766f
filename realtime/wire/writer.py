"""Writing to one socket without waiting for the client.

`DirectWriter` (`server.websocket_protocol`) writes to the transport of our own server and knows how much is unsent.
`QueuedWriter` does the same over plain ASGI, for other servers and test clients, with a queue and a task that sends.

Rules:
- `write` never blocks, and a writer does not bound its buffer, so the caller must check `buffered` and stop writing.
- After `close`, and once the peer is gone, `write` does nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol

from starlette.websockets import WebSocket, WebSocketDisconnect

from core.errors import CLOSE_REASONS, NO_CLOSE_FRAME, CloseCode
from realtime.wire.frames import Frames

EXTENSION = "marquee.writer"
LOW_WATER_BYTES = 16 * 1024
HIGH_WATER_BYTES = 64 * 1024
CLOSE_SECONDS = 5.0  # the connection ends at most CLOSE_SECONDS after our close, whatever the peer does


class Writer(Protocol):
    """The writing side of one socket."""

    def write(self, frames: Frames) -> None:
        """Send whole frames. Do nothing on a socket that is closing."""

    def buffered(self) -> int:
        """Return how many of the written bytes have not been passed to the network yet."""

    def taken(self) -> int:
        """Return about how many bytes have been passed to the network so far. The number grows while the peer reads."""

    async def drained(self) -> None:
        """If the buffer exceeded HIGH_WATER_BYTES, wait until it is down to LOW_WATER_BYTES or the socket is gone."""

    def count_control_frames(self, on_control_frame: Callable[[], bool]) -> None:
        """From now on, call `on_control_frame` for each ping, unsolicited pong and small fragment.

        A ping is answered with a pong only if the callback returns True. Other ASGI servers handle these frames
        themselves, so under them the callback is never called.
        """

    def close(self, code: CloseCode) -> None:
        """Close the socket, without waiting for a peer that does not read."""


class QueuedWriter:
    """The writer for plain ASGI. `run` sends until the socket is closed or gone; then the connection ends."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket
        self._queue: deque[bytes] = deque()
        self._size = 0
        self._sent = 0
        self._filled = asyncio.Event()
        self._low = asyncio.Event()
        self._low.set()
        self._closing: int | None = None
        self._task: asyncio.Task[None] | None = None

    def write(self, frames: Frames) -> None:
        if self._closing is None:
            self._queue.extend(frames.texts)
            self._size += frames.size
            self._filled.set()
            if self._size > HIGH_WATER_BYTES:
                self._low.clear()

    def buffered(self) -> int:
        return self._size

    def taken(self) -> int:
        return self._sent

    async def drained(self) -> None:
        await self._low.wait()

    def count_control_frames(self, on_control_frame: Callable[[], bool]) -> None:
        pass

    def close(self, code: CloseCode) -> None:
        if self._closing is None:
            self._closing = code
            self._queue.clear()
            self._filled.set()
            if self._task is not None:
                # A send may be waiting for a peer that does not read.
                asyncio.get_running_loop().call_later(CLOSE_SECONDS, self._task.cancel)

    async def run(self) -> int:
        """Send the written frames until the socket is closed or gone. Return the close code."""
        self._task = asyncio.current_task()
        try:
            while True:
                await self._filled.wait()
                self._filled.clear()
                while self._queue:
                    text = self._queue.popleft()
                    await self._websocket.send_text(text.decode())
                    self._size -= len(text)
                    self._sent += len(text)
                    if self._size <= LOW_WATER_BYTES:
                        self._low.set()
                if self._closing is not None:
                    await self._websocket.close(self._closing, CLOSE_REASONS[CloseCode(self._closing)])
                    break
        except (WebSocketDisconnect, OSError, RuntimeError):
            pass  # the peer is gone, or the server has closed the socket
        finally:
            self._queue.clear()
            self._closing = self._closing or NO_CLOSE_FRAME
            self._low.set()
        return self._closing
