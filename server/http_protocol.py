"""uvicorn's HTTP protocol, with limits for clients that send nothing, never finish a request or read no response.

Rules:
- A request head may have MAX_HEAD_BYTES and take HEAD_SECONDS; for the first one, this time begins with the connection.
  Each further request must begin within uvicorn's keep-alive timeout. `routes.http.parsing` has the deadline of the
  body.
- A connection is aborted when its client takes nothing of a response for WRITE_SECONDS; a slow client that takes some
  of it may continue.
- Input that arrives after its response is read and discarded, up to a limit. To close the connection while such input
  is unread would reset it, and the client might lose the response.
- A connection beyond the limits of `server.http_connections` gets a 503 and is closed.
- A websocket leaves this protocol, and its limits, with the handshake.
"""

from __future__ import annotations

import asyncio
import fcntl
from contextlib import suppress
from struct import Struct
from termios import TIOCOUTQ
from typing import Any, cast

import orjson
import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from core import metrics
from realtime.fanout.subscription import SLOW_CLIENT_SECONDS
from realtime.sse.event_stream import ABORT
from server.gentle_transport import GentleTransport
from server.http_connections import HttpConnections

MAX_HEAD_BYTES = 64 * 1024  # of the request line and the headers
MAX_HEADERS = 128  # a header is looked up by comparing it with each of them
HEAD_SECONDS = 10.0  # to send a head; to send anything on a new connection
# Longer, so that an event stream ends a slow client itself and logs its position.
WRITE_SECONDS = SLOW_CLIENT_SECONDS + 5.0
WRITE_CHECK_SECONDS = 2.5
# For clients that send their whole body before they read: enough for a picture over a slow line.
LINGER_SECONDS = 30.0
LINGER_BYTES = 64 * 1024 * 1024
LINGER_QUIET_SECONDS = 5.0  # without a byte: then no more is expected
SHORT_LINGER_SECONDS = 1.0  # for a connection beyond the limits, and when the service stops

RETRY_AFTER_SECONDS = 5
_INT = Struct("i")

log = structlog.get_logger("http_protocol")


# What the parser expects next. Plain numbers, because looking up members of an Enum for each request is slow.
_IDLE = 0  # a request, or nothing
_HEAD = 1  # the rest of a head
_BODY = 2  # the rest of a body
_LINGERING = 3  # nothing: input is discarded, and the connection will be closed
_GONE = 4  # nothing: the connection is lost, or has become a websocket


class _BadHead(Exception):
    """A head that is rejected although it can be parsed."""


class MarqueeHTTPProtocol(HttpToolsProtocol):
    """Offers `ABORT` in the `extensions` of each request's scope: a function that aborts the connection.

    Over plain ASGI, a response can end only after all of it is sent, which a client that does not read prevents.
    """

    _raw: asyncio.Transport
    _connections: HttpConnections
    _address = ""
    _is_counted = False
    _is_refused = False  # because of the limits of connections; lingers
    is_finishing = False  # nothing more is written
    _linger_seconds: float
    _phase = _IDLE
    _deadline: asyncio.TimerHandle | None = None  # of the head, or for discarding input
    _chunk = 0  # bytes of the data that is being parsed
    _has_progressed = False  # whether that data has completed a head or a part of a body
    _unparsed = 0  # bytes received since then
    _is_discarding = False  # whether it discards the rest of a body whose response is complete
    _discard_until = 0.0
    _discard_bytes = 0
    _write_timer: asyncio.TimerHandle | None = None
    _untaken = 0  # bytes that the client had not taken at `_taken_at`, when it last took some
    _taken_at = 0.0

    # --- the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._linger_seconds = LINGER_SECONDS
        self._raw = cast(asyncio.Transport, transport)  # uvloop's transport is not a subclass of it
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
        self._stop_watching_writes()
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
            # Sent ahead: the request before would never notice that its client has gone.
            self._refuse(400, "Expected the handshake after the response to the previous request", "invalid")
            return
        self._phase = _GONE
        self._stop_deadline()
        self._leave()
        assert isinstance(self.transport, GentleTransport)
        self.transport.forget_protocol()
        self.transport = self._raw
        super().handle_websocket_upgrade()
        self.parser = None  # type: ignore[assignment]  # it refers to this protocol, which has ended

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
        """Whether every request received so far has its whole response."""
        return self.cycle is None or self.cycle.response_complete

    def on_message_begin(self) -> None:
        # Armed by the body that ended in the same chunk, if its response had been complete before.
        self._unset_keepalive_if_required()
        self._phase = _HEAD
        super().on_message_begin()
        scope: Any = self.scope
        scope["extensions"] = {ABORT: self._raw.abort}

    def on_header(self, name: bytes, value: bytes) -> None:
        # The parser leaves the white space after a value, which is not part of it (RFC 9110, section 5.5).
        super().on_header(name, value.rstrip(b" \t"))

    def on_headers_complete(self) -> None:
        self._has_progressed = True
        # The exact size is needed only if everything received since the last request is larger than the limit.
        if self._unparsed + self._chunk > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            target, headers = self._head_sizes()
            if target + headers > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
                raise _BadHead
        super().on_headers_complete()
        self._phase = _BODY
        if not self.parser.should_upgrade():
            # The parser reports trailer fields as headers. They come after the headers were used, and are dropped.
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
            self._start_deadline(HEAD_SECONDS, self._head_expired)  # until now, nothing waited for the head
        elif self._phase == _BODY:
            self._unset_keepalive_if_required()
            self._start_discarding()

    def _expect_next_request(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _head_sizes(self) -> tuple[int, int]:
        """Return the sizes in bytes of the target and of the headers received so far."""
        return len(self.url), sum(len(name) + len(value) + 4 for name, value in self.headers)  # ": " and CR LF

    # --- rejected requests

    def _head_expired(self) -> None:
        self._deadline = None
        if not self._is_response_complete:
            # The client has sent part of the next request before the response to this one.
            self._start_deadline(HEAD_SECONDS, self._head_expired)
        elif self._phase == _HEAD:
            self._refuse(408, f"Expected the request line and the headers within {HEAD_SECONDS:g} seconds", "head_time")
        else:
            # No response: a browser that has opened a connection in advance would take it for that of its next request.
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
        """Send an error response that the application does not know of, and close the connection."""
        metrics.HTTP_REFUSED.labels(reason).inc()
        if self._is_discarding:  # the request has had its response
            self.is_finishing = True
            self._linger()
            return
        if not self._is_response_complete:
            if self._phase != _BODY or self.pipeline:  # a pipelined request; the ones before it still get responses
                self._phase, self.cycle.keep_alive = _LINGERING, False
                return
            if self.cycle.response_started:
                self._abort()
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not self._is_refused:  # `HttpConnections` logs the others, at most once a minute
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
        """Close the connection once its client can receive the response. uvicorn calls this by `transport.close()`."""
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
        """Send what is written and the end of the stream, and discard what arrives meanwhile."""
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
        self._watch_writes()

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
        self._watch_writes()

    def eof_received(self) -> None:
        # The transport closes itself once the client has taken what is written, if it ever does.
        self.is_finishing = True
        self._watch_writes()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.is_finishing:
            self._stop_watching_writes()

    def _watch_writes(self) -> None:
        """Begin to check that the client takes what is written. Until it does, nothing more is written."""
        self._stop_watching_writes()
        self._untaken, self._taken_at = self._untaken_bytes(), self.loop.time()
        if self._raw.get_write_buffer_size():
            self._write_timer = self.loop.call_later(WRITE_CHECK_SECONDS, self._check_writes)

    def _check_writes(self) -> None:
        untaken, now = self._untaken_bytes(), self.loop.time()
        if untaken < self._untaken:
            self._untaken, self._taken_at = untaken, now
        if now - self._taken_at >= WRITE_SECONDS:
            metrics.HTTP_REFUSED.labels("slow").inc()
            log.info("slow client disconnected", address=self._address, untaken_bytes=untaken)
            self._abort()
        else:
            self._write_timer = self.loop.call_later(WRITE_CHECK_SECONDS, self._check_writes)

    def _untaken_bytes(self) -> int:
        """Return how many bytes the client has not acknowledged, as far as the system knows.

        Our own buffer alone would not do: the system's buffer holds megabytes, and takes more from ours only after it
        has sent a large part of them.
        """
        queued = 0
        with suppress(OSError):
            (queued,) = _INT.unpack(
                fcntl.ioctl(self._raw.get_extra_info("socket").fileno(), TIOCOUTQ, bytes(_INT.size))
            )
        return self._raw.get_write_buffer_size() + queued

    def _stop_watching_writes(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
