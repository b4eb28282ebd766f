"""uvicorn's sans-I/O websocket protocol, with a way to write frames without ASGI.

Rules:
- The ASGI extension `marquee.writer` hands the application a `DirectWriter`. Both the writer and uvicorn write whole
  frames to the transport, so frames never interleave.
- A close does not wait for a peer that does not read.
- After a close frame is sent, input is still read for a moment: closing with unread input would reset the connection,
  and the peer would never receive the frame. After a rejected handshake, input is read for as long as after any other
  HTTP response (`server.http_protocol`), and the connection counts as an HTTP connection.
- A peer that still takes data counts as alive, even when its pong is late.
- A ping counts as a client message. A ping gets no pong when it exceeds the rate limit or while much data is
  unsent, so that a peer that does not read cannot fill the memory. RFC 6455 (section 5.5.3) requires a pong only for
  the latest ping.
- A small fragment counts as a client message, too, because parsing a frame costs about as much as handling a short
  message. The last fragment is not counted by itself, because its message is counted.
- A message that is sent in fragments must be complete within MESSAGE_SECONDS, because its fragments are kept until
  then. An incomplete frame has no deadline of its own, because its client cannot send a pong before the frame ends.
- Input is parsed in pieces, because a large input may hold thousands of small frames. After a piece that completes a
  message, parsing continues when the application has taken the message. Parsing that takes longer than TURN_SECONDS
  continues in a later turn of the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

import orjson
import structlog
from uvicorn.config import Config
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.datastructures import Headers
from websockets.frames import Frame
from websockets.http11 import Request, Response
from websockets.protocol import State

from core import metrics, scope_keys
from core.errors import CLOSE_REASONS, NO_CLOSE_FRAME, CloseCode
from realtime.wire.frames import Frames
from realtime.wire.writer import CLOSE_SECONDS, EXTENSION, HIGH_WATER_BYTES, LOW_WATER_BYTES
from server.lingering import Lingering
from server.websocket_parsing import Parser, handshake_problem, unparsed_refusal

SMALL_FRAGMENT_BYTES = 1024  # a fragment of at least this size does not count as a message
MESSAGE_SECONDS = 60.0  # as for the body of an HTTP request
PIECE_BYTES = 4 * 1024  # at most 682 frames of 6 bytes, which take about 5 ms
TURN_SECONDS = 0.002  # measured with `time.monotonic`, because the time of the loop does not advance within a turn
MAX_CLOSING_BYTES = 16 * 1024  # after our close frame, only the peer's close frame is of interest
SHUTDOWN_SECONDS = 2.0  # a peer that does not reply to the close frame must not delay the shutdown
LINGER_SECONDS = 1.0

log = structlog.get_logger("websocket_protocol")


class MarqueeWebSocketProtocol(WebSocketsSansIOProtocol):
    """The websocket protocol class for uvicorn, passed as `uvicorn.Config(ws=…)`."""

    _is_counted = False
    _is_discarding = False
    _lingering: Lingering | None = None  # set after a rejected handshake
    _shutdown_timer: asyncio.TimerHandle | None = None
    _written = 0  # the number of bytes of frames handed to the transport
    _taken_at_ping = 0
    _unparsed = b""  # input that waits for a later turn; no more is read in the meantime
    _turn_ends = 0.0  # the time until which the application may take messages without a pause
    _turn: asyncio.Handle | None = None  # the next turn that parses a part of `_unparsed`
    _message_timer: asyncio.TimerHandle | None = None  # ends the wait for the fragments of a message
    _closing_bytes = 0  # the number of bytes parsed after our close frame
    # A function that counts a control frame or a small fragment, and returns whether it is within the rate limit.
    on_control_frame: Callable[[], bool] | None = None

    def __init__(self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: Any = None) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = Parser(self._answers_ping, max_size=config.ws_max_size, logger=self.conn.logger)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.set_write_buffer_limits(high=HIGH_WATER_BYTES, low=LOW_WATER_BYTES)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._is_counted:
            self._is_counted = False
            metrics.websocket_closed(self._close_code())
        self.on_control_frame = None
        self._unparsed = b""
        self._stop_message_timer()
        if self._lingering is not None:
            self._lingering.end()
        super().connection_lost(exc)

    def _close_code(self) -> int:
        """Return the code of the first close frame, ours or the peer's."""
        sent, received = self.conn.close_sent, self.conn.close_rcvd
        first = received if self.conn.close_rcvd_then_sent else (sent or received)
        return first.code if first is not None else NO_CLOSE_FRAME

    async def send(self, message: Any) -> None:
        is_last = message["type"] == "websocket.http.response.body" and not message.get("more_body", False)
        if is_last and self.initial_response is not None and not self.disconnected:
            status, headers, body = self.initial_response
            self._respond(status, Headers(headers), body + message["body"])
            return
        if message["type"] == "websocket.accept" and self.conn.handshake_exc is not None:
            raise RuntimeError("an invalid handshake cannot be accepted")
        await super().send(message)
        if message["type"] == "websocket.accept" and self.is_open:
            self._is_counted = True
            metrics.websocket_opened()
            self._receive_more()

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        scope: Any = self.scope
        if self.conn.handshake_exc is not None:
            scope[scope_keys.HANDSHAKE_ERROR] = handshake_problem(self.conn.handshake_exc)
        else:
            scope["extensions"][EXTENSION] = DirectWriter(self)

    def data_received(self, data: bytes) -> None:
        is_usual = self.handshake_complete and not (self.close_sent or self._is_discarding or self._unparsed)
        if is_usual and len(data) <= PIECE_BYTES:
            super().data_received(data)
        elif self._is_discarding:
            if self._lingering is not None:
                self._lingering.discard(len(data))
        elif not self.handshake_initiated:
            super().data_received(data)
            if self.conn.handshake_exc is not None and not self.handshake_initiated:
                self._refuse_unparsed(self.conn.handshake_exc)
        else:
            self._unparsed += data
            self.transport.pause_reading()
            if self.handshake_complete and not self.read_paused and self._turn is None:
                self._parse_pieces()

    def _parse_pieces(self) -> None:
        """Parse input until a piece has completed a message, or until TURN_SECONDS have passed."""
        self._turn = None
        data, position = self._unparsed, 0
        until = time.monotonic() + TURN_SECONDS
        while position < len(data) and not (self.read_paused or self._is_discarding or self.transport.is_closing()):
            if position and time.monotonic() > until:
                break
            piece = data[position : position + PIECE_BYTES]
            position += len(piece)
            if self.close_sent:
                self._closing_bytes += len(piece)
            if self._closing_bytes <= MAX_CLOSING_BYTES:
                super().data_received(piece)
            else:
                self._linger()
        self._unparsed = data[position:] if not self._is_discarding else b""
        if not self.read_paused:
            self._receive_more()

    def _receive_more(self) -> None:
        """Parse the input that has arrived or, if there is none, resume reading."""
        self.read_paused = False
        if self.transport.is_closing():
            self._unparsed = b""
        elif not self._unparsed:
            self.transport.resume_reading()
        elif self._turn is None:
            self._turn = self.loop.call_soon(self._parse_pieces)

    async def receive(self) -> Any:
        """Return the next message. Other tasks get a turn when this one has handled messages for TURN_SECONDS."""
        if self.queue.empty():
            message = await self.queue.get()
            self._turn_ends = time.monotonic() + TURN_SECONDS
        else:
            if time.monotonic() > self._turn_ends:
                await asyncio.sleep(0)
                self._turn_ends = time.monotonic() + TURN_SECONDS
            message = self.queue.get_nowait()
        if self.read_paused and self.queue.empty():
            self._receive_more()
        return message

    def _refuse_unparsed(self, error: Exception) -> None:
        """Reject a handshake that `websockets` cannot parse, although httptools could."""
        self.conn.data_to_send()  # discard the library's own response, whose form differs from ours
        refusal = unparsed_refusal(error)
        metrics.HTTP_REFUSED.labels(refusal.reason).inc()
        address = self.client[0] if self.client is not None else ""
        log.info("handshake rejected", status=refusal.status, reason=refusal.reason, address=address)
        self._refuse(refusal.status, refusal.detail)

    def handle_pong(self, event: Frame) -> None:
        if self.pending_ping_payload != bytes(event.data) and self.on_control_frame is not None:
            self.on_control_frame()  # the pong is unsolicited
        super().handle_pong(event)

    def _answers_ping(self) -> bool:
        is_allowed = self.on_control_frame is None or self.on_control_frame()
        return is_allowed and not self.close_sent and self.transport.get_write_buffer_size() <= HIGH_WATER_BYTES

    def handle_text(self, event: Frame) -> None:
        super().handle_text(event)
        if not event.fin:
            self._begin_fragments(event)

    def handle_bytes(self, event: Frame) -> None:
        super().handle_bytes(event)
        if not event.fin:
            self._begin_fragments(event)

    def handle_cont(self, event: Frame) -> None:
        self.frames[0] += event.data
        if event.fin:
            self._stop_message_timer()
            self.send_receive_event_to_app()
        else:
            self._count_fragment(event)

    def _begin_fragments(self, event: Frame) -> None:
        # The fragments are joined as they arrive, because a list of small ones would take up 60 times their size.
        self.frames = [bytearray(event.data)]  # type: ignore[list-item]  # uvicorn takes any bytes-like object
        self._message_timer = self.loop.call_later(MESSAGE_SECONDS, self._message_expired)
        self._count_fragment(event)

    def _message_expired(self) -> None:
        self._message_timer = None
        if self.read_paused or self._unparsed:  # the rest of the message may have arrived
            self._message_timer = self.loop.call_later(MESSAGE_SECONDS, self._message_expired)
        elif self.is_open:
            self.frames = [bytearray()]  # type: ignore[list-item]  # further fragments may still arrive
            self.close_now(CloseCode.TOO_SLOW)

    def _stop_message_timer(self) -> None:
        if self._message_timer is not None:
            self._message_timer.cancel()
            self._message_timer = None

    def _count_fragment(self, event: Frame) -> None:
        """Count a fragment, other than the last of its message, if it is small."""
        if len(event.data) < SMALL_FRAGMENT_BYTES and self.on_control_frame is not None:
            self.on_control_frame()

    def handle_close(self, event: Frame) -> None:
        super().handle_close(event)
        if self.close_timer is None:
            # transport.close() first waits until all data is sent, which never happens if the peer does not read.
            self.close_timer = self.loop.call_later(CLOSE_SECONDS, self.transport.abort)

    def _flush(self) -> None:
        self.transport.write(b"".join(self.conn.data_to_send()))

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type == "text" and not self.close_sent:
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:  # this is the client's fault, so it is not logged as an error
                self.frames = []
                self.conn.send_close(CloseCode.INVALID_TEXT, CLOSE_REASONS[CloseCode.INVALID_TEXT])
                self.handle_parser_exception()
                return
        super().send_receive_event_to_app()

    def handle_parser_exception(self) -> None:
        """Close as uvicorn does, but keep reading for LINGER_SECONDS, so that the close frame arrives."""
        assert self.conn.close_sent is not None
        self._disconnect(self.conn.close_sent.code, self.conn.close_sent.reason)
        self._linger()

    def _linger(self) -> None:
        """Discard all further input, and close the connection after LINGER_SECONDS."""
        self._is_discarding = True
        self._close_after(LINGER_SECONDS)

    def _close_after(self, seconds: float) -> None:
        if self.close_timer is not None:
            self.close_timer.cancel()
        if seconds > 0:
            self.close_timer = self.loop.call_later(seconds, self._close_or_abort)
        else:
            self._close_or_abort()

    def _close_or_abort(self) -> None:
        # transport.close() first waits until all data is sent, which never happens if the peer does not read.
        self.transport.close()
        self.close_timer = self.loop.call_later(CLOSE_SECONDS, self.transport.abort)

    def send_keepalive_ping(self) -> None:
        super().send_keepalive_ping()
        self._taken_at_ping = self.taken

    def keepalive_timeout(self) -> None:
        if self.taken > self._taken_at_ping and self.transport.get_write_buffer_size() and self.ping_timeout:
            # The ping may still be queued behind data that the peer is reading, so its pong is not overdue.
            self._taken_at_ping = self.taken
            self.pong_timer = self.loop.call_later(self.ping_timeout, self.keepalive_timeout)
            return
        super().keepalive_timeout()
        self.queue.put_nowait({"type": "websocket.disconnect", "code": 1011})
        self.close_timer = self.loop.call_later(CLOSE_SECONDS, self.transport.abort)

    @property
    def taken(self) -> int:
        """The approximate number of bytes that the network has taken. It grows while the peer reads."""
        return self._written - self.transport.get_write_buffer_size()

    def write_frames(self, wire: bytes) -> None:
        self._written += len(wire)
        self.transport.write(wire)

    def shutdown(self) -> None:
        """Close because the service is stopping, and abort the connection after SHUTDOWN_SECONDS. Idempotent."""
        if not self.handshake_complete:
            # A 503 makes the client try another server.
            self._refuse(503, "The service is stopping", {"Retry-After": "1"})
        elif self.is_open:
            self.close_now(CloseCode.SERVICE_RESTART)
        if self._shutdown_timer is None:
            self.stop_keepalive()
            self._shutdown_timer = self.loop.call_later(SHUTDOWN_SECONDS, self.transport.abort)

    def _refuse(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        """Reject the handshake with an HTTP response, and close the connection."""
        about = {"Content-Type": "application/json", "X-Content-Type-Options": "nosniff"}
        self._respond(status, Headers({**about, **(headers or {})}), orjson.dumps({"detail": detail}))

    def _respond(self, status: int, headers: Headers, body: bytes) -> None:
        headers.setdefault("Date", formatdate(usegmt=True))
        headers.setdefault("Content-Length", str(len(body)))
        headers.setdefault("Connection", "close")
        self.transport.write(Response(status, HTTPStatus(status).phrase, headers, body).serialize())
        self.handshake_complete = self.close_sent = self.disconnected = True
        self._is_discarding, self._unparsed = True, b""
        if not self.transport.is_closing():
            self.transport.write_eof()
            self.transport.resume_reading()
            address = self.client[0] if self.client is not None else ""
            self._lingering = Lingering(self.app_state["http_connections"], address, self._close_after)

    def send_500_response(self) -> None:
        if not (self.initial_response or self.handshake_complete):
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "Internal Server Error")

    @property
    def is_open(self) -> bool:
        return (
            self.handshake_complete
            and not self.close_sent
            and self.conn.state is State.OPEN
            and not self.transport.is_closing()
        )

    def close_now(self, code: CloseCode) -> None:
        """Send a close frame, and abort the connection when the peer does not answer it within CLOSE_SECONDS."""
        self.conn.send_close(code, CLOSE_REASONS[code])
        self._disconnect(code, CLOSE_REASONS[code])
        self.close_timer = self.loop.call_later(CLOSE_SECONDS, self.transport.abort)

    def _disconnect(self, code: int, reason: str) -> None:
        """Write the close frame, notify the application, and keep reading for the peer's answer."""
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self._flush()
        self.close_sent = True
        self.stop_keepalive()
        if self.read_paused:
            self._receive_more()


class DirectWriter:
    """A writer to the transport of one websocket; see `realtime.wire.writer.Writer`."""

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

    def count_control_frames(self, on_control_frame: Callable[[], bool]) -> None:
        self._protocol.on_control_frame = on_control_frame

    def close(self, code: CloseCode) -> None:
        if self._protocol.is_open:
            self._protocol.close_now(code)
