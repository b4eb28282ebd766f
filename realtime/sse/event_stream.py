"""The log as server-sent events (WHATWG HTML, section 9.2): `GET /events` for clients without a websocket.

Invariants:
- A stream reads its next page, from the ring or the log, only when the client has taken the previous page. The server's
  flow control provides the back-pressure: there is no queue, and a slow client costs at most one page of memory. These
  pages count as bytes that wait for the sockets and streams of a client (`core.network.unsent`).
- An event's id is its position. The events sent after an id are exactly those that follow it in the log and that the
  client may see.
- A stream ends when its client disconnects or accepts no data for too long, when its token or session ends, when its
  user may no longer see its topics, and when the service stops. After that, nothing is sent, not even events that have
  already been read.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from core import metrics
from core.errors import Forbidden, NotAcceptable, TooManyRequests, Unavailable
from core.identity import Identity
from core.network.addresses import network_of
from core.scope_keys import ABORT, SOCKET
from realtime.fanout.spec import check_topics, user_id_of
from realtime.feed.feed import PAGE_BYTES
from realtime.feed.positions import LOG_REPLACED
from realtime.sockets.places import Places
from realtime.sockets.registry import Registry
from realtime.sse import replay
from realtime.sse.replay import PositionLost, Query, Replay, View
from realtime.wire import frames, sse_format
from repository.engine.events import Event, Head

MAX_STREAMS = 1_000  # The limit applies to each worker.
ADDRESS_SHARE = 4  # One address may have at most a quarter of the streams.
FULL_RETRY_SECONDS = 5
MIN_RETRY_MS = 1_000  # the wait before a browser reconnects is random, so that not all browsers return together
MAX_RETRY_MS = 3_000
PIECE_BYTES = 32 * 1024  # A write of PIECE_BYTES must complete within `Pace.write_seconds`.
MIN_BACKOFF_SECONDS = 0.05  # The back-off applies during a database outage.
MAX_BACKOFF_SECONDS = 2.0
FINISH_SECONDS = 1.0
ROOM_SECONDS = 0.25  # the pause until a stream checks again whether its client has read enough

_HEADERS = {
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # without this header, nginx would hold events back until a buffer is full
    "Vary": "Accept",
}

log = structlog.get_logger("event_stream")


@dataclass(frozen=True, slots=True)
class Pace:
    heartbeat_seconds: float = 15.0  # Proxies drop connections that are idle for 30 to 120 s.
    write_seconds: float = 45.0  # A client that accepts no data for `write_seconds` is disconnected, as on a websocket.


class EventStreams:
    """One per process. `max_streams` is MAX_STREAMS, or less if the service accepts fewer connections."""

    def __init__(
        self,
        source: Replay,
        registry: Registry,
        places: Places,
        pace: Pace | None = None,
        max_streams: int = MAX_STREAMS,
    ) -> None:
        self.source = source
        self.registry = registry
        self.places = places
        self.pace = pace or Pace()
        self._max_streams = max_streams
        self._max_per_address = max(1, max_streams // ADDRESS_SHARE) if places.limits_addresses else None
        self._open: set[EventStream] = set()
        self._by_network: Counter[str] = Counter()
        self._is_stopping = False

    def __len__(self) -> int:
        """Return the number of open streams."""
        return len(self._open)

    def stream(self, identity: Identity | None, query: Query, last_event_id: str | None) -> Response:
        """Return a response that sends the events after a position as they happen.

        `last_event_id` is the value of the header. It takes precedence over the query, because a browser repeats its
        original query whenever it reconnects. Raises Forbidden. The response, called as an ASGI application, raises
        NotAcceptable, Unauthenticated, TooManyRequests or Unavailable.
        """
        return EventStream(self, replay.view(identity, query), query, last_event_id)

    def stop(self) -> None:
        """End every stream, and accept no further ones."""
        self._is_stopping = True
        for stream in list(self._open):
            stream.end()

    @contextmanager
    def place(self, stream: EventStream, address: str) -> Iterator[None]:
        """Count an open stream until the context ends. Raises Unavailable or TooManyRequests beyond a limit."""
        if self._is_stopping:
            raise Unavailable("The service is stopping")
        if len(self._open) >= self._max_streams:
            raise Unavailable("Too many event streams", {"Retry-After": str(FULL_RETRY_SECONDS)})
        network = network_of(address)
        if self._max_per_address is not None and self._by_network[network] >= self._max_per_address:
            raise TooManyRequests(
                f"Expected at most {self._max_per_address} event streams from {network}; close one first",
                FULL_RETRY_SECONDS,
            )
        self._open.add(stream)
        self._by_network[network] += 1
        metrics.STREAMS.inc()
        try:
            yield
        finally:
            self._open.remove(stream)
            self._by_network[network] -= 1
            if not self._by_network[network]:
                del self._by_network[network]
            metrics.STREAMS.dec()


class EventStream(Response):
    """A response that sends events until the client leaves or the service ends the stream."""

    media_type = "text/event-stream"

    def __init__(self, streams: EventStreams, view: View, query: Query, last_event_id: str | None) -> None:
        self.status_code = 200
        self.background = None
        self._streams = streams
        self._source = streams.source
        self._feed = streams.source.feed
        self._pace = streams.pace
        self._view = view
        self._query = query
        self._last_event_id = last_event_id
        self._head = Head("", 0)  # every event up to this position was sent
        self._generation = 0
        self._is_position_checked = True  # False as long as the log cannot be read
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._wrote_at = 0.0
        self._client = ""  # the address or network that the stream's page is counted for
        self._reserved = 0  # bytes for the page that is being read or sent

    def end(self) -> None:
        """End the stream without finishing a write that has begun. May be called from anywhere in the event loop."""
        if not self._ended.done():
            self._ended.set_result(None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if SOCKET in scope:
            raise NotAcceptable("Event streams are not available over a websocket: subscribe instead, or request JSON")
        client = scope.get("client")
        address = client[0] if client else ""
        with ExitStack() as stack:
            self._client = stack.enter_context(self._streams.places.take(address)).client
            stack.callback(self._reserve, 0)
            stack.enter_context(self._streams.place(self, address))
            await self._sign_in(stack)
            reason = await self._find_start()
            self.init_headers({**_HEADERS, "Stream-Position": sse_format.position_text(self._head)})
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            if scope["method"] == "HEAD":
                await send({"type": "http.response.body"})
            elif await self._serve(reason, receive, send):
                await _finish(scope, receive, send)

    async def _sign_in(self, stack: ExitStack) -> None:
        """Watch the identity for as long as the stream is open. Raises Unauthenticated."""
        if self._view.identity is not None:
            registry = self._streams.registry
            entry = registry.add(self._view.identity, self._identity_changed)
            stack.callback(registry.discard, entry)
            await registry.confirm(entry)

    def _identity_changed(self, identity: Identity | None) -> None:
        with suppress(Forbidden):
            if identity is not None:
                check_topics(self._view.topics, identity)
                self._view = replace(self._view, identity=identity)
                return
        self._view = replace(self._view, topics=frozenset())
        self.end()

    async def _find_start(self) -> str | None:
        """Find the position to begin at. Return None, or the reason why the requested position cannot be used."""
        feed = self._feed
        await feed.reach_head()
        self._generation = feed.generation
        position = None
        try:
            position = self._source.requested_position(self._query, self._last_event_id)
            if position is not None:
                await self._source.check(position)
            if self._generation != feed.generation:
                raise PositionLost(LOG_REPLACED)
        except PositionLost as lost:
            self._generation, self._head = feed.generation, feed.head
            return str(lost)
        except Unavailable:
            # Browsers stop reconnecting after an error response, so accept the position now and check it once the log
            # is readable.
            self._is_position_checked = False
        self._head = Head(feed.head.epoch, position.seq if position is not None else feed.head.seq)
        return None

    async def _serve(self, reason: str | None, receive: Receive, send: Send) -> bool:
        """Send until the stream ends. Return False if the client has ended the stream."""
        following = asyncio.create_task(self._follow(reason, send), name="event-stream")
        leaving = asyncio.create_task(_until_gone(receive), name="event-stream-client")
        identity = self._view.identity
        seconds = max(0.0, identity.expires_at - time.time()) if identity is not None else None
        try:
            waiting: set[asyncio.Future[Any]] = {following, leaving, self._ended}
            await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            is_gone = leaving.done()
            following.cancel()
            leaving.cancel()
            results = await asyncio.gather(following, leaving, return_exceptions=True)
        if isinstance(results[0], TimeoutError):
            log.info("slow event stream closed", position=self._head.seq)
        elif isinstance(results[0], Exception) and not is_gone:
            log.error("event stream failed", exc_info=results[0])
        return not is_gone

    async def _follow(self, reason: str | None, send: Send) -> None:
        """Send until cancelled. Raises TimeoutError when the client accepts no data for too long."""
        user_id = user_id_of(self._view.identity)
        welcome = frames.welcome(self._head, user_id, int(self._pace.heartbeat_seconds))
        retry = sse_format.retry(random.randint(MIN_RETRY_MS, MAX_RETRY_MS))
        await self._write(send, retry + sse_format.frame_block(self._head.epoch, self._head.seq, welcome))
        if reason is not None:
            await self._start_over(reason, send)
        pause = 0.0
        while True:
            events: Sequence[Event] = ()
            if self._streams.places.unsent.is_full(self._client):
                await asyncio.sleep(ROOM_SECONDS)
                continue
            self._reserve(PAGE_BYTES)
            try:
                events = await self._read_on()
                pause = 0.0
            except PositionLost as lost:
                await self._start_over(str(lost), send)
            except Unavailable:
                pause = min(max(2 * pause, MIN_BACKOFF_SECONDS), MAX_BACKOFF_SECONDS)
            if events:
                await self._send_events(events, send)
                # Reading from the ring does not yield, so let other tasks run between two pages.
                await asyncio.sleep(0)
            self._reserve(0)
            if pause:
                await asyncio.sleep(pause)
            elif not events:
                await self._wait_for_more()
            if self._next_heartbeat() <= asyncio.get_running_loop().time():
                await self._write(send, sse_format.heartbeat(self._head))

    def buffered(self) -> int:
        """Return how many bytes of the client's limit are reserved for the page that is being read or sent."""
        return self._reserved

    def _reserve(self, size: int) -> None:
        self._reserved = size
        self._streams.places.unsent.count(self._client, self)

    async def _read_on(self) -> Sequence[Event]:
        """Return the next events. Raises PositionLost or Unavailable."""
        if not self._is_position_checked:
            await self._source.check(self._head)
            self._is_position_checked = True
        return await self._source.read_on(self._head.seq, self._generation)

    async def _start_over(self, reason: str, send: Send) -> None:
        self._generation, self._head, self._is_position_checked = self._feed.generation, self._feed.head, True
        frame = frames.resync(reason, self._head)
        await self._write(send, sse_format.frame_block(self._head.epoch, self._head.seq, frame))

    def _next_heartbeat(self) -> float:
        return self._wrote_at + self._pace.heartbeat_seconds

    async def _wait_for_more(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._next_heartbeat()):
                await self._feed.wait_beyond(self._head.seq)

    async def _send_events(self, events: Sequence[Event], send: Send) -> None:
        blocks: list[bytes] = []
        size = 0
        for event in events:
            text = self._view.text(event)
            if text is not None:
                blocks.append(sse_format.frame_block(self._head.epoch, event.seq, text))
                size += len(text)
                if size >= PIECE_BYTES:
                    await self._write(send, b"".join(blocks))
                    blocks, size = [], 0
        if blocks:
            await self._write(send, b"".join(blocks))
        self._head = Head(self._head.epoch, events[-1].seq)

    async def _write(self, send: Send, text: bytes) -> None:
        for start in range(0, len(text), PIECE_BYTES):
            async with asyncio.timeout(self._pace.write_seconds):
                piece = text[start : start + PIECE_BYTES]
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        self._wrote_at = asyncio.get_running_loop().time()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _finish(scope: Scope, receive: Receive, send: Send) -> None:
    """End the response. If the client does not accept the end in time, abort the connection where the server can."""
    try:
        async with asyncio.timeout(FINISH_SECONDS):
            await send({"type": "http.response.body"})
    except TimeoutError:
        abort = (scope.get("extensions") or {}).get(ABORT)
        if abort is not None:
            abort()
            await _until_gone(receive)
