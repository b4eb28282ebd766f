"""uvicorn's HTTP protocol, with limits for clients that send nothing, never finish a request or read no response.

Rules:
- A request head may have MAX_HEAD_BYTES and take HEAD_SECONDS. For the first head, this time begins when the connection
  opens. Each further request must begin within uvicorn's keep-alive timeout. `routes.http.parsing` sets the deadline
  for bodies.
- A connection is aborted when its client reads nothing of a response for too long; see `server.unread_responses`.
- Input that arrives after the response to its request is discarded, up to a limit. Closing the connection without
  reading this input would reset the connection, and the client might lose the response.
- A connection beyond the limits of `server.http_connections` gets a 503 and is closed.
- At the handshake, a websocket is handed to another protocol, and these limits no longer apply.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import orjson
import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from core import metrics
from realtime.sse.event_stream import ABORT
from server.gentle_transport import GentleTransport
from server.http_connections import HttpConnections
from server.unread_responses import WriteWatch

MAX_HEAD_BYTES = 64 * 1024  # The maximum size of the request line and the headers together.
MAX_HEADERS = 128  # The number of headers is limited, because each lookup searches all of them.
HEAD_SECONDS = 10.0  # The time that a client gets to send a request head.
# Some clients send their whole body before they read the response. This allows for a picture over a slow connection.
LINGER_SECONDS = 30.0
LINGER_BYTES = 64 * 1024 * 1024
LINGER_QUIET_SECONDS = 5.0  # After this long without a byte, no more input is expected.
SHORT_LINGER_SECONDS = 1.0  # Replaces LINGER_SECONDS for a connection beyond the limits, and when the service stops.

RETRY_AFTER_SECONDS = 5

log = structlog.get_logger("http_protocol")


# The phases of a connection. They are plain numbers, because looking up Enum members for each request is slow.
_IDLE = 0  # Between requests: a new request may begin.
_HEAD = 1  # Inside a request head.
_BODY = 2  # Inside a request body.
_LINGERING = 3  # Input is discarded, and the connection will be closed.
_GONE = 4  # The connection is lost or has become a websocket.


class _BadHead(Exception):
    """A request head that is rejected although it can be parsed."""


class MarqueeHTTPProtocol(HttpToolsProtocol):
    """The HTTP protocol class for uvicorn. The extension `ABORT` in the scope of a request aborts the connection.

    In plain ASGI, a response ends only when all of it is sent, which never happens if the client does not read.
    """

    _raw: asyncio.Transport
    _connections: HttpConnections
    _address = ""
    _is_counted = False
    _is_refused = False  # Whether the connection exceeds the limits and is kept open for its response.
    is_finishing = False  # Whether no more data will be written.
    _linger_seconds: float
    _phase = _IDLE
    _deadline: asyncio.TimerHandle | None = None  # Ends the wait for a request head, or the discarding of input.
    _chunk = 0  # The size in bytes of the data that is being parsed.
    _has_progressed = False  # Whether the data being parsed has completed a head or a part of a body.
    _unparsed = 0  # The number of bytes received since a head or a part of a body was last completed.
    _is_discarding = False  # Whether the rest of a body is discarded because its response is complete.
    _discard_until = 0.0
    _discard_bytes = 0
    _write_watch: WriteWatch

    # --- the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._linger_seconds = LINGER_SECONDS
        self._raw = cast(asyncio.Transport, transport)  # uvloop's transport is not a subclass of asyncio.Transport
        self._write_watch = WriteWatch(self._raw)
        super().connection_made(GentleTransport(self._raw, self))
        self._connections = self.app_state["http_connections"]
        self._address = self.client[0] if self.client is not None else ""
        reason = self._connections.enter(self._address)
        if reason is None:
            self._is_counted = True
            self._start_deadline(HEAD_SECONDS, self._head_expired)
        elif self._connections.may_linger():
            self._is_refused = True
            self._linger_seconds = SHORT_LINGER_SECONDS
            self._refuse(503, reason, "limit")
        else:
            metrics.HTTP_REFUSED.labels("limit").inc()
            self._abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._phase, self.is_finishing = _GONE, True
        self._stop_deadline()
        self._write_watch.stop()
        self._leave()
        super().connection_lost(exc)
        assert isinstance(self.transport, GentleTransport)
        self.transport.forget_protocol()

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
        self._leave()
        assert isinstance(self.transport, GentleTransport)
        self.transport.forget_protocol()
        self.transport = self._raw
        super().handle_websocket_upgrade()
        self.parser = None  # type: ignore[assignment]  # the parser refers to this protocol, which has ended

    # --- input

    def data_received(self, data: bytes) -> None:
        if self._phase >= _LINGERING:
            self._discard(len(data))
            return
        self._chunk, self._has_progressed = len(data), False
        super().data_received(data)
        if self._phase >= _LINGERING:
            return
        if self._has_progressed:
            self._unparsed = 0
        else:
            self._unparsed += self._chunk
        if self._unparsed > MAX_HEAD_BYTES:
            self.send_400_response("")
        elif self._is_discarding:
            self._discard(self._chunk)
        elif self._phase == _HEAD or (self._phase == _IDLE and self._is_response_complete):
            if self._deadline is None:
                self._start_deadline(HEAD_SECONDS, self._head_expired)
        elif self._deadline is not None:
            self._stop_deadline()

    @property
    def _is_response_complete(self) -> bool:
        """Whether the responses to all requests received so far are complete."""
        return self.cycle is None or self.cycle.response_complete

    def on_message_begin(self) -> None:
        # The keep-alive timer is running if the previous body ended in this chunk, after its response was complete.
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
        if self._unparsed + self._chunk > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            target, headers = self._head_sizes()
            if target + headers > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
                raise _BadHead
        super().on_headers_complete()
        self._phase = _BODY
        if not self.parser.should_upgrade():
            # The parser reports trailer fields as headers. They arrive after the headers were used, so drop them.
            self.headers = []

    def on_body(self, body: bytes) -> None:
        self._has_progressed = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._has_progressed = True
        self._phase = _IDLE
        super().on_message_complete()
        if self._is_discarding:
            self._is_discarding = False
            self._stop_deadline()
            self._expect_next_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.is_finishing or not self._is_response_complete:
            return
        if self._phase == _HEAD:
            self._unset_keepalive_if_required()
            self._start_deadline(HEAD_SECONDS, self._head_expired)  # the time for the next head starts now
        elif self._phase == _BODY:
            self._unset_keepalive_if_required()
            self._start_discarding()

    def _expect_next_request(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _head_sizes(self) -> tuple[int, int]:
        """Return the sizes in bytes of the request target and of the headers received so far."""
        return len(self.url), sum(len(name) + len(value) + 4 for name, value in self.headers)  # 4 is for ": " and CR LF

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
        target, headers = self._head_sizes() if self._phase == _HEAD else (0, 0)
        size = max(target + headers, self._unparsed) if self._phase == _HEAD else 0
        if size > MAX_HEAD_BYTES and target > headers:
            self._refuse(414, f"Expected a request line and headers of at most {MAX_HEAD_BYTES} bytes", "head_size")
        elif size > MAX_HEAD_BYTES:
            self._refuse(431, f"Expected a request line and headers of at most {MAX_HEAD_BYTES} bytes", "head_size")
        elif self._phase == _HEAD and len(self.headers) > MAX_HEADERS:
            self._refuse(431, f"Expected at most {MAX_HEADERS} headers", "head_size")
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
        body = orjson.dumps({"detail": detail})
        head = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"connection", b"close"),
            *([(b"retry-after", b"%d" % RETRY_AFTER_SECONDS)] if status == 503 else []),
        ]
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in head)
        self._raw.write(STATUS_LINE[status] + lines + b"\r\n" + body)
        self.is_finishing = True
        self._linger()

    # --- the end

    def finish(self) -> None:
        """Close the connection once its client can receive the response. uvicorn calls this as `transport.close()`."""
        if self.is_finishing:
            return
        self.is_finishing = True
        self._unset_keepalive_if_required()
        if self._phase != _IDLE and self.cycle is not None:
            self._linger()
        else:
            self._close()

    def shutdown(self) -> None:
        self._linger_seconds = SHORT_LINGER_SECONDS
        super().shutdown()
        if self._phase == _LINGERING and self.is_finishing:  # otherwise, a response is still being written
            self._start_discarding()

    def _linger(self) -> None:
        """Send all data written so far and the end of the stream, and discard the input that arrives meanwhile."""
        self._phase = _LINGERING
        self._is_discarding = False
        if self._raw.is_closing():
            return
        self.flow.resume_reading()
        self._raw.write_eof()
        self._start_discarding()

    def _start_discarding(self) -> None:
        self._is_discarding = self._phase == _BODY
        self._discard_until = self.loop.time() + self._linger_seconds
        self._discard_bytes = LINGER_BYTES
        self._start_deadline(min(self._linger_seconds, LINGER_QUIET_SECONDS), self._close)

    def _discard(self, size: int) -> None:
        if not (self.is_finishing or self._is_discarding):
            return  # a response is still being written
        self._discard_bytes -= size
        seconds = self._discard_until - self.loop.time()
        if self._discard_bytes < 0 or seconds <= 0:
            self._close()
        else:
            self._start_deadline(min(seconds, LINGER_QUIET_SECONDS), self._close)

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
