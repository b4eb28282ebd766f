"""uvicorn's HTTP protocol, with limits for clients that send nothing, never finish a request or read no response.

Rules:
- A request head may have MAX_HEAD_BYTES and take HEAD_SECONDS. For the first head, this time begins when the connection
  opens. Each further request must begin within uvicorn's keep-alive timeout. `routes.http.uploads` sets the deadline
  for bodies.
- A connection is aborted when its client reads nothing of a response for too long; see `server.unread_responses`.
- Requests of a connection are handled one after the other. Input that follows a request waits unparsed until the
  response is complete. Up to MAX_WAITING_BYTES are read meanwhile, so that the end of the connection is noticed.
  Requests that end in the same piece as the first are queued; a rejection or a websocket handshake is postponed.
- A client that ends its side of the connection gets the responses to its complete requests. Because it looks like a
  client that has left, each of these responses must be complete within HALF_CLOSED_SECONDS.
- Input that arrives after the response to its request is discarded, up to a limit. Closing the connection without
  reading this input would reset the connection, and the client might lose the response.
- A request starts when its body is complete, at the latest BODY_HEADSTART_SECONDS after it could start (`Headstart`).
- A body must not consist of many small chunks. When the rest of a body is discarded, at most CHUNK_CREDIT_BYTES /
  MIN_CHUNK_BYTES chunks are parsed to find the next request. If there are more, the connection is closed.
- A connection beyond the limits of `server.http_connections` gets a 503 and is closed.
- At the handshake, a websocket is handed to another protocol, and these limits no longer apply.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Any, cast

import httptools
import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from core import metrics
from core.scope_keys import ABORT
from server import http_budgets, http_heads
from server.gentle_transport import GentleTransport
from server.http_budgets import HALF_CLOSED_SECONDS, MIN_CHUNK_BYTES, ChunkCredit, Deadline, DiscardBudget, Headstart
from server.http_connections import HttpConnections, Place, disconnect
from server.http_heads import HEAD_SECONDS, MAX_HEAD_BYTES, MAX_HEADERS, Unparsed
from server.http_refusals import refusal
from server.unread_responses import WriteWatch, once_taken

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

    is_finishing = False  # Whether no more data will be written.
    _phase = _IDLE
    _deadline: Deadline  # Ends the wait for a request head, the discarding of input, or a half-closed connection.
    _waiting: bytearray  # Input that has not been parsed yet.
    _postponed: Callable[[], None] | None = None  # Handles the rest of the input after the responses before it.
    _has_ended = False  # Whether the client has ended its side of the connection.
    _running: RequestResponseCycle | None = None  # The latest request that was passed to the application.
    _is_discarding = False  # Whether the rest of a body is discarded because its response is complete.
    _discards: DiscardBudget | None = None

    # --- the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._linger_seconds, self._waiting = http_budgets.LINGER_SECONDS, bytearray()
        self._deadline, self._headstart = Deadline(self.loop), Headstart(self.loop)
        self._context, self._unparsed, self._chunk_credit = copy_context(), Unparsed(), ChunkCredit()
        self._raw = cast(asyncio.Transport, transport)  # uvloop's transport is not a subclass of asyncio.Transport
        self._gentle = GentleTransport(self._raw, self)
        super().connection_made(self._gentle)
        self._address = self.client[0] if self.client is not None else ""
        connections: HttpConnections = self.app_state["http_connections"]
        self._write_watch = WriteWatch(self._gentle, connections.unsent, connections.client_of(self._address))
        self._place = Place(connections, self._address)
        if self._place.refusal is None:
            self._deadline.start(HEAD_SECONDS, self._head_expired)
        elif self._place.is_open:
            self._linger_seconds = http_budgets.SHORT_LINGER_SECONDS
            self._refuse(503, self._place.refusal, "limit")
        else:
            metrics.HTTP_REFUSED.labels("limit").inc()
            self._abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._phase, self.is_finishing, self._postponed = _GONE, True, None
        self._headstart.drop()
        self._deadline.stop()
        self._write_watch.stop()
        self._place.leave()
        if self._running is not None:
            # uvicorn notifies only the request that was parsed last, which may still be queued behind the running one.
            disconnect(self._running)
        super().connection_lost(exc)
        self._gentle.forget_protocol()

    def handle_websocket_upgrade(self) -> None:
        if not self._is_response_complete:
            self._postponed = self.handle_websocket_upgrade
            return
        if self._has_ended:
            self._close()
            return
        self._phase = _GONE
        self._unset_keepalive_if_required()
        self._waiting.clear()
        self._gentle.set_full(False)
        self._deadline.stop()
        self._write_watch.stop()
        self._place.leave()
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
            self._context.run(self._parse_waiting)  # plain asyncio may call this in the context of a request

    @property
    def _must_wait(self) -> bool:
        """Whether further input has to wait because it belongs to a later request than the one being handled."""
        return bool(self.pipeline) or (self._phase != _BODY and not self._is_response_complete)

    def _parse_waiting(self) -> None:
        """Parse the waiting input until none is left, or until the rest must wait for a response."""
        if self._postponed is not None and self._phase < _LINGERING and not self._must_wait:
            postponed, self._postponed = self._postponed, None
            postponed()
        size = len(self._waiting)
        while self._waiting and self._phase < _LINGERING and not self._must_wait:
            piece = bytes(self._waiting[: http_budgets.PIECE_BYTES])
            del self._waiting[: http_budgets.PIECE_BYTES]
            self._parse(piece)
        size -= len(self._waiting)
        if self._phase >= _LINGERING:
            self._waiting.clear()
            return
        self._gentle.set_full(self._has_ended or len(self._waiting) > http_budgets.MAX_WAITING_BYTES)
        if self._has_ended:
            self._await_responses()
        elif not size:
            pass
        elif self._is_discarding:
            self._discard(size)
        elif self._phase == _HEAD or (self._phase == _IDLE and self._is_response_complete):
            if not self._deadline.is_running:
                self._deadline.start(HEAD_SECONDS, self._head_expired)
        else:
            self._deadline.stop()

    def _parse(self, piece: bytes) -> None:
        self._unset_keepalive_if_required()
        self._unparsed.begin(len(piece))
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
        self._unparsed.end()
        if self._unparsed.size > MAX_HEAD_BYTES:
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
        self._unparsed.progress()
        if self._unparsed.may_be_large or len(self.headers) > MAX_HEADERS:
            http_heads.check(self.url, self.headers)
        if self.parser.should_upgrade() and not self._should_upgrade() and http_heads.has_body(self.headers):
            raise http_heads.BadHead  # the parser would take the body for further requests
        super().on_headers_complete()
        if self.pipeline:
            # uvicorn has paused reading until the response to the previous request is complete. Without reading, the
            # end of the connection would not be noticed.
            self.flow.resume_reading()
        self._phase = _BODY
        self._chunk_credit = ChunkCredit()
        if not self.parser.should_upgrade():
            # The parser reports trailer fields as headers. They arrive after the headers were used, so drop them.
            self.headers = []

    def on_chunk_header(self) -> None:
        self._chunk_credit.begin_chunk()

    def on_body(self, body: bytes) -> None:
        self._unparsed.progress()
        if not self._is_discarding:  # the chunks of a discarded body only use up what is left
            self._chunk_credit.add(len(body))
            super().on_body(body)
            if self.flow.read_paused:  # the rest is read only when the application asks for it
                self._headstart.end()

    def on_message_complete(self) -> None:
        self._unparsed.progress()
        self._phase = _IDLE
        super().on_message_complete()
        self._headstart.end()
        if self._is_discarding:
            self._is_discarding = False
            self._deadline.stop()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        self._context.run(self._start_next)  # the next request must not inherit the log context of this one

    def _start_next(self) -> None:
        super().on_response_complete()
        if self.is_finishing:
            return
        if not self._must_wait and (self._waiting or self._postponed is not None):
            self.loop.call_soon(self._parse_waiting)
        elif self._has_ended:
            self._await_responses()
        if not self._is_response_complete:
            return
        if self._phase == _HEAD:
            self._unset_keepalive_if_required()
            self._deadline.start(HEAD_SECONDS, self._head_expired)  # the time for the next head starts now
        elif self._phase == _BODY:
            self._unset_keepalive_if_required()
            self._start_discarding()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        app = once_taken(self.flow, app)
        self._headstart.begin(cycle, partial(super()._start_asgi_task, cycle, app))

    # --- rejected requests

    def _head_expired(self) -> None:
        if not self._is_response_complete:
            # The client has sent part of the next request before the response to the current request is complete.
            self._deadline.start(HEAD_SECONDS, self._head_expired)
        elif self._phase == _HEAD:
            self._refuse(408, f"Expected the request line and the headers within {HEAD_SECONDS:g} seconds", "head_time")
        else:
            # A browser that connected in advance would take a response sent now for the response to its next request.
            metrics.HTTP_REFUSED.labels("idle").inc()
            self.finish()

    def send_400_response(self, msg: str) -> None:
        """Respond to input that the parser, or one of its callbacks, has rejected."""
        if self._phase == _HEAD:
            self._refuse(*http_heads.rejection(self.url, self.headers, self._unparsed.size))
        elif self._phase == _BODY and self._chunk_credit.is_spent:
            self._refuse(400, f"Expected chunks of at least {MIN_CHUNK_BYTES} bytes on average", "small_chunks")
        else:
            self._refuse(400, "Expected a valid HTTP/1.1 request", "invalid")

    def _refuse(self, status: int, detail: str, reason: str) -> None:
        """After the responses to earlier requests, send an error response, and close the connection."""
        if not self._is_response_complete and (self._phase != _BODY or self.pipeline):
            if self._phase == _BODY:  # the rejected request is the last one in the queue
                self.pipeline.popleft()
                self.cycle = self.pipeline[0][0] if self.pipeline else cast(RequestResponseCycle, self._running)
            self._phase, self._postponed = _IDLE, partial(self._refuse, status, detail, reason)
            return
        self._headstart.drop()
        metrics.HTTP_REFUSED.labels(reason).inc()
        if self._is_discarding:  # the request already has its response
            self._linger()
            return
        if not self._is_response_complete:
            if self.cycle.response_started:
                self._abort()
                return
            disconnect(self.cycle)
        if self._place.refusal is None:  # `HttpConnections` logs refused connections, at most once a minute
            log.info("request rejected", status=status, reason=reason, address=self._address)
        self._raw.write(refusal(status, detail, self.server_state.default_headers))
        self._linger()

    # --- the end

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn never keeps the connection open
        """Return whether to keep the connection open for responses, although the client has ended its side."""
        self._has_ended = True
        if not self.is_finishing:
            self._gentle.set_full(True)  # there is nothing more to read
            self._await_responses()
        if self.is_finishing:
            # The transport closes itself once the client has taken all written data, so check that the client does so.
            self._write_watch.start(self._abort)
        return not self.is_finishing

    def _await_responses(self) -> None:
        """Close the connection, whose client has ended its side, unless complete requests are still unanswered."""
        is_incomplete = self._phase == _BODY and not self.pipeline  # the rest of the body will never arrive
        if self._waiting or self._postponed is not None or not (self._is_response_complete or is_incomplete):
            self._deadline.start(HALF_CLOSED_SECONDS, self._responses_expired)
        else:
            self._close()

    def _responses_expired(self) -> None:
        if self.flow.write_paused:
            return  # `WriteWatch` checks that the client takes its data; the next response gets new time after that
        if self._running is not None:
            disconnect(self._running)
        self._close()

    def finish(self) -> None:
        """Close the connection once its client can receive the response. uvicorn calls this as `transport.close()`."""
        if self.is_finishing:
            return
        self._unset_keepalive_if_required()
        has_more_input = self._phase != _IDLE or self.pipeline or self._waiting or self._postponed is not None
        if has_more_input and self.cycle is not None:
            self._linger()
        else:
            self._close()

    def shutdown(self) -> None:
        self._linger_seconds = http_budgets.SHORT_LINGER_SECONDS
        super().shutdown()
        if self._phase == _LINGERING:
            self._start_discarding()

    def _linger(self) -> None:
        """Send all data written so far and the end of the stream, and discard the input that arrives meanwhile."""
        self.is_finishing, self._phase = True, _LINGERING
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
        self._chunk_credit = ChunkCredit()
        self._discards = DiscardBudget(self._linger_seconds)
        self._discard(0)

    def _discard(self, size: int) -> None:
        seconds = self._discards.spend(size) if self._discards is not None else 0.0
        if seconds > 0:
            self._deadline.start(seconds, self._close)
        else:
            self._close()

    def _close(self) -> None:
        self.is_finishing, self._phase = True, _LINGERING
        self._deadline.stop()
        self._raw.close()
        self._write_watch.start(self._abort)

    def _abort(self) -> None:
        self.is_finishing, self._phase = True, _LINGERING
        self._raw.abort()

    # --- output

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_watch.start(self._abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.is_finishing:
            self._write_watch.stop()
            if self._has_ended:
                self._await_responses()
