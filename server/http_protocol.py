"""uvicorn's HTTP protocol, with limits for clients that send nothing, never finish a request or read no response.

Rules:
- A request head may have MAX_HEAD_BYTES and take HEAD_SECONDS. For the first head, this time begins when the connection
  opens. Each further request must begin within uvicorn's keep-alive timeout. `routes.http.parsing` sets the deadline
  for bodies.
- A connection is aborted when its client reads nothing of a response for too long; see `server.unread_responses`.
- Requests of a connection are handled one after the other. Input that follows a request waits unparsed until the
  response is complete. Up to MAX_WAITING_BYTES are read meanwhile, so that the end of the connection is noticed.
- Input that arrives after the response to its request is discarded, up to a limit. Closing the connection without
  reading this input would reset the connection, and the client might lose the response.
- A body must not consist of many small chunks, because each of them takes time. When the rest of a body is discarded,
  at most CHUNK_CREDIT_BYTES / MIN_CHUNK_BYTES chunks are parsed to find the next request. If there are more, the
  connection is closed.
- A connection beyond the limits of `server.http_connections` gets a 503 and is closed.
- At the handshake, a websocket is handed to another protocol, and these limits no longer apply.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import httptools
import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from core import metrics
from realtime.sse.event_stream import ABORT
from server import http_budgets, http_heads
from server.gentle_transport import GentleTransport
from server.http_budgets import CHUNK_CREDIT_BYTES, MIN_CHUNK_BYTES, DiscardBudget, SmallChunks
from server.http_connections import HttpConnections
from server.http_heads import HEAD_SECONDS, MAX_HEAD_BYTES, MAX_HEADERS
from server.http_refusals import refusal
from server.unread_responses import WriteWatch

# Input is parsed in small pieces, because all requests that end in one piece are parsed and queued together.
PIECE_BYTES = 1024
MAX_WAITING_BYTES = 64 * 1024  # When more input than this waits for a response, reading is paused.

log = structlog.get_logger("http_protocol")


# The phases of a connection. They are plain numbers, because looking up Enum members for each request is slow.
_IDLE = 0  # Between requests: a new request may begin.
_HEAD = 1  # Inside a request head.
_BODY = 2  # Inside a request body.
_LINGERING = 3  # Input is discarded, and the connection will be closed.
_GONE = 4  # The connection is lost or has become a websocket.


class MarqueeHTTPProtocol(HttpToolsProtocol):
    """The HTTP protocol class for uvicorn. The extension `ABORT` in the scope of a request aborts the connection.

    In plain ASGI, a response ends only when all of it is sent, which never happens if the client does not read.
    """

    _raw: asyncio.Transport
    _gentle: GentleTransport
    _connections: HttpConnections
    _address = ""
    _is_counted = False
    _is_refused = False  # Whether the connection exceeds the limits and is kept open for its response.
    is_finishing = False  # Whether no more data will be written.
    _linger_seconds: float
    _phase = _IDLE
    _deadline: asyncio.TimerHandle | None = None  # Ends the wait for a request head, or the discarding of input.
    _waiting: bytearray  # Input that has not been parsed yet.
    _running: RequestResponseCycle | None = None  # The latest request that was passed to the application.
    _piece = 0  # The size in bytes of the data that is being parsed.
    _has_progressed = False  # Whether the data being parsed has completed a head or a part of a body.
    _unparsed = 0  # The number of bytes received since a head or a part of a body was last completed.
    _chunk_credit = 0  # By how many more bytes the body may fall short of MIN_CHUNK_BYTES per chunk.
    _is_discarding = False  # Whether the rest of a body is discarded because its response is complete.
    _discards: DiscardBudget | None = None
    _write_watch: WriteWatch

    # --- the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._linger_seconds = http_budgets.LINGER_SECONDS
        self._waiting = bytearray()
        self._raw = cast(asyncio.Transport, transport)  # uvloop's transport is not a subclass of asyncio.Transport
        self._write_watch = WriteWatch(self._raw)
        self._gentle = GentleTransport(self._raw, self)
        super().connection_made(self._gentle)
        self._connections = self.app_state["http_connections"]
        self._address = self.client[0] if self.client is not None else ""
        reason = self._connections.enter(self._address)
        if reason is None:
            self._is_counted = True
            self._start_deadline(HEAD_SECONDS, self._head_expired)
        elif self._connections.may_linger():
            self._is_refused = True
            self._linger_seconds = http_budgets.SHORT_LINGER_SECONDS
            self._refuse(503, reason, "limit")
        else:
            metrics.HTTP_REFUSED.labels("limit").inc()
            self._abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._phase, self.is_finishing = _GONE, True
        self._stop_deadline()
        self._write_watch.stop()
        self._leave()
        if self._running is not None:
            # uvicorn notifies only the request that was parsed last, which may still be queued behind the running one.
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)
        self._gentle.forget_protocol()

    def _leave(self) -> None:
        if self._is_counted:
            self._is_counted = False
            self._connections.leave(self._address)
        if self._is_refused:
            self._is_refused = False
            self._connections.lingered()

    def handle_websocket_upgrade(self) -> None:
        if not self._is_response_complete:
            # After an upgrade, the previous request would not notice a client that disconnects before the response.
            self._refuse(400, "Expected the websocket handshake after the response to the previous request", "invalid")
            return
        self._phase = _GONE
        self._stop_deadline()
        self._write_watch.stop()
        self._leave()
        self._gentle.forget_protocol()
        self.transport = self._raw
        super().handle_websocket_upgrade()
        self.parser = None  # type: ignore[assignment]  # the parser refers to this protocol, which has ended

    # --- input

    def data_received(self, data: bytes) -> None:
        if self._phase >= _LINGERING:
            self._discard(len(data))
        else:
            self._waiting += data
            self._parse_waiting()

    @property
    def _must_wait(self) -> bool:
        """Whether further input has to wait because it belongs to a later request than the one being handled."""
        return bool(self.pipeline) or (self._phase != _BODY and not self._is_response_complete)

    def _parse_waiting(self) -> None:
        """Parse the waiting input until none is left, or until the rest must wait for a response."""
        size = len(self._waiting)
        while self._waiting and self._phase < _LINGERING and not self._must_wait:
            piece = bytes(self._waiting[:PIECE_BYTES])
            del self._waiting[:PIECE_BYTES]
            self._parse(piece)
        size -= len(self._waiting)
        if self._phase >= _LINGERING:
            self._waiting.clear()
        self._gentle.set_full(len(self._waiting) > MAX_WAITING_BYTES)
        if not size or self._phase >= _LINGERING:
            return
        if self._is_discarding:
            self._discard(size)
        elif self._phase == _HEAD or (self._phase == _IDLE and self._is_response_complete):
            if self._deadline is None:
                self._start_deadline(HEAD_SECONDS, self._head_expired)
        elif self._deadline is not None:
            self._stop_deadline()

    def _parse(self, piece: bytes) -> None:
        self._unset_keepalive_if_required()
        self._piece, self._has_progressed = len(piece), False
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserError:
            self.send_400_response("")
            return
        except httptools.HttpParserUpgrade as upgrade:
            if self._should_upgrade():
                self.handle_websocket_upgrade()
                return
            (parsed,) = upgrade.args
            self._waiting[:0] = piece[parsed:]  # the upgrade is ignored, so another request may follow
        if self._has_progressed:
            self._unparsed = 0
        else:
            self._unparsed += self._piece
        if self._unparsed > MAX_HEAD_BYTES:
            self.send_400_response("")

    @property
    def _is_response_complete(self) -> bool:
        """Whether the responses to all requests received so far are complete."""
        return self.cycle is None or self.cycle.response_complete

    def on_message_begin(self) -> None:
        # The keep-alive timer is running if the previous body ended in this piece, after its response was complete.
        self._unset_keepalive_if_required()
        self._phase = _HEAD
        super().on_message_begin()
        scope: Any = self.scope
        scope["extensions"] = {ABORT: self._raw.abort}

    def on_header(self, name: bytes, value: bytes) -> None:
        # The parser keeps trailing white space, which is not part of the value (RFC 9110, section 5.5).
        super().on_header(name, value.rstrip(b" \t"))

    def on_headers_complete(self) -> None:
        self._has_progressed = True
        # The exact size of the head is needed only if all data since the last request exceeds the limit.
        if self._unparsed + self._piece > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            http_heads.check(self.url, self.headers)
        super().on_headers_complete()
        if self.pipeline:
            # uvicorn has paused reading until the response to the previous request is complete. Without reading, the
            # end of the connection would not be noticed.
            self.flow.resume_reading()
        self._phase = _BODY
        self._chunk_credit = CHUNK_CREDIT_BYTES
        if not self.parser.should_upgrade():
            # The parser reports trailer fields as headers. They arrive after the headers were used, so drop them.
            self.headers = []

    def on_chunk_header(self) -> None:
        self._chunk_credit -= MIN_CHUNK_BYTES
        if self._chunk_credit < 0:
            raise SmallChunks

    def on_body(self, body: bytes) -> None:
        self._has_progressed = True
        if not self._is_discarding:  # the chunks of a discarded body only use up what is left
            self._chunk_credit += len(body)
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._has_progressed = True
        self._phase = _IDLE
        super().on_message_complete()
        if self._is_discarding:
            self._is_discarding = False
            self._stop_deadline()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.is_finishing:
            return
        if self._waiting and not self._must_wait:
            self.loop.call_soon(self._parse_waiting)
        if not self._is_response_complete:
            return
        if self._phase == _HEAD:
            self._unset_keepalive_if_required()
            self._start_deadline(HEAD_SECONDS, self._head_expired)  # the time for the next head starts now
        elif self._phase == _BODY:
            self._unset_keepalive_if_required()
            self._start_discarding()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    # --- rejected requests

    def _head_expired(self) -> None:
        self._deadline = None
        if not self._is_response_complete:
            # The client has sent part of the next request before the response to the current request is complete.
            self._start_deadline(HEAD_SECONDS, self._head_expired)
        elif self._phase == _HEAD:
            self._refuse(408, f"Expected the request line and the headers within {HEAD_SECONDS:g} seconds", "head_time")
        else:
            # A browser that connected in advance would take a response sent now for the response to its next request.
            metrics.HTTP_REFUSED.labels("idle").inc()
            self.finish()

    def send_400_response(self, msg: str) -> None:
        """Respond to input that the parser, or one of its callbacks, has rejected."""
        if self._phase == _HEAD:
            self._refuse(*http_heads.rejection(self.url, self.headers, self._unparsed))
        elif self._phase == _BODY and self._chunk_credit < 0:
            self._refuse(400, f"Expected chunks of at least {MIN_CHUNK_BYTES} bytes on average", "invalid")
        else:
            self._refuse(400, "Expected a valid HTTP/1.1 request", "invalid")

    def _refuse(self, status: int, detail: str, reason: str) -> None:
        """Send an error response without calling the application, and close the connection."""
        metrics.HTTP_REFUSED.labels(reason).inc()
        if self._is_discarding:  # the request already has its response
            self.is_finishing = True
            self._linger()
            return
        if not self._is_response_complete:
            if self._phase != _BODY or self.pipeline:  # the request is pipelined; earlier requests still get responses
                self._phase, self.cycle.keep_alive = _LINGERING, False
                return
            if self.cycle.response_started:
                self._abort()
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not self._is_refused:  # `HttpConnections` logs refused connections, at most once a minute
            log.info("request rejected", status=status, reason=reason, address=self._address)
        self._raw.write(refusal(status, detail, self.server_state.default_headers))
        self.is_finishing = True
        self._linger()

    # --- the end

    def finish(self) -> None:
        """Close the connection once its client can receive the response. uvicorn calls this as `transport.close()`."""
        if self.is_finishing:
            return
        self.is_finishing = True
        self._unset_keepalive_if_required()
        has_more_input = self._phase != _IDLE or self.pipeline or self._waiting
        if has_more_input and self.cycle is not None:
            self._linger()
        else:
            self._close()

    def shutdown(self) -> None:
        self._linger_seconds = http_budgets.SHORT_LINGER_SECONDS
        super().shutdown()
        if self._phase == _LINGERING and self.is_finishing:  # otherwise, a response is still being written
            self._start_discarding()

    def _linger(self) -> None:
        """Send all data written so far and the end of the stream, and discard the input that arrives meanwhile."""
        self._phase = _LINGERING
        self._is_discarding = False
        if self._raw.is_closing():
            return
        self._waiting.clear()
        self._gentle.set_full(False)
        self.flow.resume_reading()
        self._raw.write_eof()
        self._start_discarding()

    def _start_discarding(self) -> None:
        self._is_discarding = self._phase == _BODY
        self._chunk_credit = CHUNK_CREDIT_BYTES
        self._discards = DiscardBudget(self._linger_seconds)
        self._discard(0)

    def _discard(self, size: int) -> None:
        if not (self.is_finishing or self._is_discarding):
            return  # a response is still being written
        seconds = self._discards.spend(size) if self._discards is not None else 0.0
        if seconds > 0:
            self._start_deadline(seconds, self._close)
        else:
            self._close()

    def _close(self) -> None:
        self.is_finishing = True
        self._phase = _LINGERING
        self._stop_deadline()
        self._raw.close()
        self._write_watch.start(self._on_slow_client)

    def _abort(self) -> None:
        self.is_finishing = True
        self._phase = _LINGERING
        self._raw.abort()

    def _start_deadline(self, seconds: float, expire: Any) -> None:
        self._stop_deadline()
        self._deadline = self.loop.call_later(seconds, expire)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    # --- output

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_watch.start(self._on_slow_client)

    def eof_received(self) -> None:
        # The transport closes itself once the client has taken all written data, so check that the client does so.
        self.is_finishing = True
        self._write_watch.start(self._on_slow_client)

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.is_finishing:
            self._write_watch.stop()

    def _on_slow_client(self, untaken_bytes: int) -> None:
        metrics.HTTP_REFUSED.labels("slow").inc()
        log.info("slow client disconnected", address=self._address, untaken_bytes=untaken_bytes)
        self._abort()
