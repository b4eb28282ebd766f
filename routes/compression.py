"""Compress responses with gzip for clients that accept it.

Rules:
- Only text is compressed: JSON, documents, pages, styles and scripts. Pictures are compressed already, and the events
  of a stream must not wait.
- Responses below MIN_BYTES stay as they are.
- Responses that contain secrets are never compressed: their routes set `scope_keys.UNCOMPRESSED`. An attacker who can
  add text to such a response could guess the secret from the compressed size (the attack BREACH).
- Replies to requests over a websocket are not compressed, because they become text in frames.
- The tag of a compressed response is weak, because its bytes are not those of the tag. Preconditions ignore `W/`.
- A document that never changes, such as `/openapi.json`, is compressed once (`scope_keys.DOCUMENT`). Errors at its URL
  are not the document, so they are neither kept nor sent in its place.
- A thread compresses what would delay other clients. A response of several parts, such as a file, is compressed part by
  part, so that it is never in memory as a whole.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core import scope_keys
from core.error_bodies import weights_of

MIN_BYTES = 1_400  # A smaller response fits into one network packet anyway.
MAX_BYTES_ON_LOOP = 64 * 1024  # These take less than half a millisecond.
MAX_THREADS = 2  # The other threads of the pool stay free, however many large responses wait.
# The fastest level: a page of movies shrinks to a fifth of its size. Level 6 would save another fifth of that, but take
# three times as long.
LEVEL = 1
# A compressor of this size takes 64 KiB of memory, a quarter of zlib's default, because each slow client that downloads
# a file keeps one. Pages of rows become 1 % larger, scripts 4 %.
WINDOW_BITS = 13
MEMORY_LEVEL = 6
GZIP_FORMAT = 16  # added to WINDOW_BITS, makes zlib write gzip's header and checksum

_MEDIA_TYPES = frozenset({"application/json", "application/problem+json", "application/x-ndjson", "image/svg+xml"})
_EVENT_STREAM = "text/event-stream"


@dataclass(eq=False)
class Compression:
    """Middleware that compresses the responses of `app`."""

    app: ASGIApp
    _room: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_THREADS))
    _documents: dict[str, bytes] = field(default_factory=dict)  # the compressed documents by name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope_keys.SOCKET in scope:
            await self.app(scope, receive, send)
        else:
            await self.app(scope, receive, _Response(scope, send, self._room, self._documents).send)


def accepts_gzip(accept_encoding: str) -> bool:
    """Return whether a client with this `Accept-Encoding` takes gzip and does not prefer uncompressed responses.

    See RFC 9110, section 12.5.3.
    """
    weights = weights_of(accept_encoding)
    gzip = next((weights[name] for name in ("gzip", "x-gzip", "*") if name in weights), 0.0)
    return gzip > 0 and gzip >= weights.get("identity", 0.0)


def may_be_compressed(scope: Scope, status: int, headers: Mapping[str, str]) -> bool:
    """Return whether the response, or the one that a 304 stands for, is compressed for clients that accept it."""
    if scope_keys.UNCOMPRESSED in scope or "content-encoding" in headers:
        return False
    if status == 304:
        return True
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    return media_type in _MEDIA_TYPES or (media_type.startswith("text/") and media_type != _EVENT_STREAM)


@dataclass(eq=False)
class _Response:
    """A response on its way to the client. `_start` is its first message, kept until the size of the body is known."""

    _scope: Scope
    _send: Send
    _room: asyncio.Semaphore
    _documents: dict[str, bytes]
    _start: Message | None = None
    _compressor: Any = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message.setdefault("headers", [])
            await self._begin(message)
        elif message["type"] == "http.response.body" and (self._start is not None or self._compressor is not None):
            await self._add(message.get("body", b""), more=message.get("more_body", False))
        else:
            await self._send(message)

    async def _begin(self, start: Message) -> None:
        headers = MutableHeaders(raw=start["headers"])
        start["headers"] = headers.raw
        status = start["status"]
        if may_be_compressed(self._scope, status, headers):
            headers.add_vary_header("Accept-Encoding")
            accepts = accepts_gzip(",".join(Headers(scope=self._scope).getlist("accept-encoding")))
            if accepts and status != 304:
                self._start = start
                return
            if accepts and self._scope.get(scope_keys.KNOWN_SIZE, MIN_BYTES) >= MIN_BYTES:
                _weaken(headers)  # as in the response that the client has
        await self._send(start)

    async def _add(self, body: bytes, *, more: bool) -> None:
        start, self._start = self._start, None
        if start is not None:
            headers = MutableHeaders(raw=start["headers"])
            is_whole = not more and (body or self._scope["method"] != "HEAD")
            size = len(body) if is_whole else int(headers.get("content-length", MIN_BYTES))
            # HTTP/1.0 has no way to send a body in parts whose total size is not known yet.
            if size >= MIN_BYTES and (is_whole or self._scope.get("http_version") != "1.0"):
                headers["Content-Encoding"] = "gzip"
                _weaken(headers)
                del headers["Content-Length"]
                self._compressor = zlib.compressobj(LEVEL, zlib.DEFLATED, WINDOW_BITS + GZIP_FORMAT, MEMORY_LEVEL)
                if is_whole:
                    is_document = start["status"] == 200 and scope_keys.DOCUMENT in self._scope
                    body = await (self._document(body) if is_document else self._compressed(body, more=False))
                    headers["Content-Length"] = str(len(body))
                    self._compressor = None
            start["headers"] = headers.raw
            await self._send(start)
        if self._compressor is not None and self._scope["method"] != "HEAD":
            body = await self._compressed(body, more=more)
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _document(self, body: bytes) -> bytes:
        """Return the compressed document, which is kept for the next request."""
        name = self._scope[scope_keys.DOCUMENT]
        if name not in self._documents:
            self._documents[name] = await self._compressed(body, more=False)
        return self._documents[name]

    async def _compressed(self, body: bytes, *, more: bool) -> bytes:
        if len(body) > MAX_BYTES_ON_LOOP:
            async with self._room:
                return await asyncio.to_thread(self._compress, body, more)
        return self._compress(body, more)

    def _compress(self, body: bytes, more: bool) -> bytes:
        end = zlib.Z_SYNC_FLUSH if more else zlib.Z_FINISH  # The client can read each part when it arrives.
        found: bytes = self._compressor.compress(body) + self._compressor.flush(end)
        return found


def _weaken(headers: MutableHeaders) -> None:
    tag = headers.get("etag")
    if tag is not None and not tag.startswith("W/"):
        headers["ETag"] = f"W/{tag}"
