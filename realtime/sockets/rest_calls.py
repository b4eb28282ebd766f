"""The action `request`: a REST call that runs through the whole application, in process, with the socket's identity.

Rules:
- Validation, permissions, rate limits and idempotency are the same as over HTTP, because the code path is the same.
- A reply is sent when its call is done and the socket has taken the previous reply.
- A socket has at most MAX_REQUESTS_IN_FLIGHT calls. Of these, up to MAX_UNREAD_REPLIES run or have a reply that waits
  for the client. The next call begins when the client has taken a reply, so a client that does not read costs little
  memory.
- The bodies of the requests, and the replies until they are written, count as bytes that wait for the client
  (`realtime.wire.room`). When too many bytes wait for all sockets of the client, further requests are refused, and a
  call that has not begun gets a 503.
- As over HTTP, a write that has begun is finished even if the client disconnects, but a read is interrupted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import orjson
import structlog
from starlette.types import ASGIApp, Message, Scope
from starlette.websockets import WebSocket

from core import scope_keys
from core.identity import Identity
from core.network.shares import Shares
from realtime.sockets import actions
from realtime.sockets.parsing import BadMessage
from realtime.wire import frames
from realtime.wire.room import Room
from realtime.wire.writer import Writer

MAX_REQUESTS_IN_FLIGHT = 16
MAX_UNREAD_REPLIES = 4  # The unread replies of one socket take at most 3 MiB.
MAX_REPLY_BYTES = 768 * 1024  # A frame with MAX_REPLY_BYTES of body is within the usual limit of clients, 1 MiB.
# Headers about the connection are refused, and so are headers whose values the handshake has fixed.
REFUSED_HEADERS = frozenset({"authorization", "connection", "content-length", "cookie", "host", "transfer-encoding"})

log = structlog.get_logger("connection")


@dataclass(frozen=True, slots=True)
class RestResponse:
    """The response of one call. `error`, if any, states why the body was left out."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    error: Mapping[str, str] | None = None


TOO_LARGE: Mapping[str, str] = {
    "code": "reply_too_large",
    "detail": f"The response body exceeds {MAX_REPLY_BYTES} bytes and was omitted; see `status` for the outcome.",
}
FAILED = RestResponse(500, {"content-type": "application/json"}, b'{"detail":"Internal Server Error"}')
UNREAD = "Too many replies wait for clients with your address; read them first"
CROWDED = RestResponse(503, {"content-type": "application/json", "retry-after": "5"}, orjson.dumps({"detail": UNREAD}))


class RestCalls:
    """The REST calls of one socket. `write` sends a frame unless the socket is closed. `shares` limits how many calls
    of one client run at the same time.
    """

    def __init__(
        self, websocket: WebSocket, writer: Writer, write: Callable[[bytes], None], room: Room, shares: Shares
    ) -> None:
        self._websocket = websocket
        self._writer = writer
        self._write = write
        self._room = room
        self._shares = shares
        self._held = 0  # bytes of requests, and of replies that are not written yet
        self._places = asyncio.Semaphore(MAX_UNREAD_REPLIES)
        self._reply_turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._gone = asyncio.Event()

    def start(self, reply_to: int | str | None, wanted: actions.Request, identity: Identity | None) -> None:
        """Begin a call. The reply is written when the call is done. Raises BadMessage."""
        refused = sorted({name.lower() for name in wanted.headers} & REFUSED_HEADERS)
        if refused:
            raise BadMessage("invalid_message", f"headers: {refused[0]} is not allowed in a request over a websocket")
        if len(self._tasks) >= MAX_REQUESTS_IN_FLIGHT:
            detail = f"Expected at most {MAX_REQUESTS_IN_FLIGHT} requests at a time; wait for a reply"
            raise BadMessage("too_many_requests", detail)
        if self._room.is_full():
            raise BadMessage("too_many_requests", UNREAD)
        try:
            body = orjson.dumps(wanted.body) if "body" in wanted.model_fields_set else b""
        except TypeError:
            raise BadMessage("invalid_message", "body: expected fewer nested levels") from None
        scope = scope_of(self._websocket.scope, wanted, identity, body)
        self._hold(len(body))
        task = asyncio.create_task(self._call(reply_to, scope, body), name="request")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: self._hold(-len(body)))

    def buffered(self) -> int:
        """Return the bytes of the requests that are not done, and of the replies that are not written."""
        return self._held

    def _hold(self, size: int) -> None:
        self._held += size
        self._room.hold(self)

    async def finish(self) -> None:
        """Interrupt reads, and wait for the calls that have begun. Cancelling `finish` cancels the calls."""
        self._gone.set()
        if self._tasks:
            try:
                await asyncio.wait(set(self._tasks))
            finally:
                for task in self._tasks:
                    task.cancel()

    async def _call(self, reply_to: int | str | None, scope: Scope, body: bytes) -> None:
        async with self._places:
            if self._gone.is_set():
                return  # the call has not begun, and its client is gone
            response = await self._response(scope, body)
            self._hold(len(response.body))
            try:
                async with self._reply_turn:
                    await self._writer.drained()
                    status, headers, error = response.status, response.headers, response.error
                    reply = frames.rest_reply(reply_to, status, headers, response.body, error)
                    self._write(reply)
                    self._room.wrote(len(reply))
            finally:
                self._hold(-len(response.body))

    async def _response(self, scope: Scope, body: bytes) -> RestResponse:
        async with self._shares.of(self._room.client):
            if self._room.is_full():
                return CROWDED
            try:
                return await call(self._websocket.app, scope, body, self._gone)
            except Exception as error:
                log.error("socket request failed", exc_info=error)
                return FAILED


def scope_of(socket: Mapping[str, Any], wanted: actions.Request, identity: Identity | None, body: bytes) -> Scope:
    """Return the ASGI scope of a call. `socket` is the scope of the websocket."""
    path, _, query = wanted.path.partition("?")
    headers = [(name.lower().encode(), value.encode()) for name, value in wanted.headers.items()]
    names = {name for name, _ in headers}
    if b"content-type" not in names:
        headers.append((b"content-type", b"application/json"))
    if body:
        headers.append((b"content-length", str(len(body)).encode()))
    headers += [(name, value) for name, value in socket["headers"] if name == b"host"]
    if b"user-agent" not in names:
        headers += [(name, value) for name, value in socket["headers"] if name == b"user-agent"]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": wanted.method,
        "scheme": "https" if socket["scheme"] == "wss" else "http",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": headers,
        "client": socket.get("client"),
        "server": socket.get("server"),
        "state": dict(socket["state"]),
        scope_keys.IDENTITY: identity,
        scope_keys.SOCKET: True,
    }


async def call(app: ASGIApp, scope: Scope, body: bytes, gone: asyncio.Event) -> RestResponse:
    """Run one call through the application and collect its response. `gone` is set when the client has disconnected."""
    status, size = 500, 0
    headers: dict[str, str] = {}
    chunks: list[bytes] = []
    requested = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if requested:
            return requested.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal status, size
        if message["type"] == "http.response.start":
            status = message["status"]
            for name, value in message.get("headers", []):
                key = name.decode("latin-1").lower()
                text = value.decode("latin-1")
                headers[key] = f"{headers[key]}, {text}" if key in headers else text
        elif message["type"] == "http.response.body":
            if scope["method"] == "HEAD":
                return  # a response to HEAD has no body; over HTTP, the server leaves it out
            chunk = message.get("body", b"")
            size += len(chunk)
            if size <= MAX_REPLY_BYTES:
                chunks.append(chunk)

    await app(scope, receive, send)
    headers.pop("content-length", None)
    if size > MAX_REPLY_BYTES:
        return RestResponse(status, headers, b"", TOO_LARGE)
    return RestResponse(status, headers, b"".join(chunks))
