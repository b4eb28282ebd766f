"""uvicorn's sans-I/O websocket protocol with a way to write past ASGI.

The ASGI extension `marquee.stream` hands the application a `DirectWriter`. Writing whole frames to the transport is
safe beside uvicorn's own writes, which are whole frames, too: frames never interleave. Also here, because only the
protocol can: a close that does not wait for a peer that reads nothing, a close frame that survives unread input, and a
keepalive that takes a slow reader's progress as a sign of life.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.protocol import State

from core import metrics
from core.errors import CLOSE_REASONS, NO_CLOSE_FRAME, CloseCode
from realtime.wire.frames import Frames
from realtime.wire.writer import CLOSE_SECONDS, EXTENSION, HIGH_WATER_BYTES, LOW_WATER_BYTES

SHUTDOWN_SECONDS = 2.0  # a peer that does not answer the close must not hold up the stop
LINGER_SECONDS = 1.0


class MarqueeWebSocketProtocol(WebSocketsSansIOProtocol):
    """For `uvicorn.Config(ws=…)`."""

    _is_counted = False
    _lingering = False
    _shutdown_timer: asyncio.TimerHandle | None = None
    _written = 0  # bytes of events handed to the transport
    _taken_at_ping = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.set_write_buffer_limits(high=HIGH_WATER_BYTES, low=LOW_WATER_BYTES)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._is_counted:
            self._is_counted = False
            metrics.websocket_closed(self._close_code())
        super().connection_lost(exc)

    def _close_code(self) -> int:
        """Of the close frame that came first, ours or the peer's."""
        sent, received = self.conn.close_sent, self.conn.close_rcvd
        first = received if self.conn.close_rcvd_then_sent else (sent or received)
        return first.code if first is not None else NO_CLOSE_FRAME

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            # Refused, as it should be. uvicorn takes every handshake that ends without a websocket for our error.
            self.handshake_complete = True
        if message["type"] == "websocket.accept" and self.is_open:
            self._is_counted = True
            metrics.websocket_opened()

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if not self.close_sent:
            extensions: Any = self.scope["extensions"]
            extensions[EXTENSION] = DirectWriter(self)

    def data_received(self, data: bytes) -> None:
        if not self._lingering:
            super().data_received(data)

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type == "text" and not self.close_sent:
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:  # the client's fault: nothing for the error log
                self.frames = []
                self.conn.send_close(CloseCode.INVALID_TEXT, CLOSE_REASONS[CloseCode.INVALID_TEXT])
                self.handle_parser_exception()
                return
        super().send_receive_event_to_app()

    def handle_parser_exception(self) -> None:
        """As uvicorn's, but lingering: closing with input unread resets the connection, and the close frame is lost."""
        assert self.conn.close_sent is not None
        code, reason = self.conn.close_sent.code, self.conn.close_sent.reason
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.stop_keepalive()
        self._lingering = True
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        self.close_timer = self.loop.call_later(LINGER_SECONDS, self._close_or_abort)

    def _close_or_abort(self) -> None:
        # transport.close() waits for unsent data, for ever if the peer takes none.
        self.transport.close()
        self.close_timer = self.loop.call_later(CLOSE_SECONDS, self.transport.abort)

    def send_keepalive_ping(self) -> None:
        super().send_keepalive_ping()
        self._taken_at_ping = self.taken

    def keepalive_timeout(self) -> None:
        if self.taken > self._taken_at_ping and self.transport.get_write_buffer_size() and self.ping_timeout:
            # The pong waits behind data that is moving.
            self._taken_at_ping = self.taken
            self.pong_timer = self.loop.call_later(self.ping_timeout, self.keepalive_timeout)
            return
        super().keepalive_timeout()
        self.queue.put_nowait({"type": "websocket.disconnect", "code": 1011})
        self.close_timer = self.loop.call_later(CLOSE_SECONDS, self.transport.abort)

    @property
    def taken(self) -> int:
        """Bytes that the network has taken, about: what shows that a peer is reading."""
        return self._written - self.transport.get_write_buffer_size()

    def write_frames(self, wire: bytes) -> None:
        self._written += len(wire)
        self.transport.write(wire)

    def shutdown(self) -> None:
        """The service stops. Reading goes on until the peer has answered: closing with input unread resets the
        connection, and the close frame is lost. Called again: nothing.
        """
        if not self.handshake_complete:
            self._refuse_handshake()
        elif self.is_open:
            self.close_now(CloseCode.SERVICE_RESTART, CLOSE_REASONS[CloseCode.SERVICE_RESTART])
        if self._shutdown_timer is None:
            self.stop_keepalive()
            self._shutdown_timer = self.loop.call_later(SHUTDOWN_SECONDS, self.transport.abort)

    def _refuse_handshake(self) -> None:
        """One that is not through yet: the peer may try elsewhere."""
        headers = Headers({"Retry-After": "1", "Connection": "close", "Content-Length": "0"})
        self.conn.send_response(Response(503, "Service Unavailable", headers, b""))
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.handshake_complete = self.close_sent = self.disconnected = True
        self.transport.close()

    @property
    def is_open(self) -> bool:
        return (
            self.handshake_complete
            and not self.close_sent
            and self.conn.state is State.OPEN
            and not self.transport.is_closing()
        )

    def close_now(self, code: int, reason: str) -> None:
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.conn.send_close(code, reason)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.stop_keepalive()
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        self.close_timer = self.loop.call_later(CLOSE_SECONDS, self.transport.abort)


class DirectWriter:
    """See `realtime.wire.writer.Stream`."""

    __slots__ = ("_protocol",)

    def __init__(self, protocol: MarqueeWebSocketProtocol) -> None:
        self._protocol = protocol

    def write(self, frames: Frames) -> None:
        if self._protocol.is_open:
            self._protocol.write_frames(frames.wire)

    def buffered(self) -> int:
        return self._protocol.transport.get_write_buffer_size()

    def taken(self) -> int:
        return self._protocol.taken

    async def drained(self) -> None:
        await self._protocol.writable.wait()

    def close(self, code: int, reason: str) -> None:
        if self._protocol.is_open:
            self._protocol.close_now(code, reason)
