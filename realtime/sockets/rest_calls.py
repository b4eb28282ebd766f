"""The REST API over a socket: a request runs through the whole application, in process, as the socket's user.

So validation, rights, limits and idempotency are those of HTTP, because they are the same code.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, MutableMapping
from typing import Any
from urllib.parse import unquote

import orjson
from starlette.types import ASGIApp, Message, Scope

from core import scope_keys
from core.identity import Identity
from realtime.sockets import messages

MAX_REPLY_BYTES = 768 * 1024  # of a body: clients with the usual 1 MiB frame limit can read the reply
# What HTTP says about the connection, and what the socket has said already.
REFUSED_HEADERS = frozenset({"authorization", "connection", "content-length", "cookie", "host", "transfer-encoding"})


# The status, headers, body, and that it is whole, of a request that our own code failed at.
FAILED = (500, {"content-type": "application/json"}, b'{"detail":"Internal Server Error"}', True)


def scope_of(socket: Mapping[str, Any], wanted: messages.Request, identity: Identity | None, body: bytes) -> Scope:
    """The request as ASGI has it. `socket` is the scope of the websocket."""
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


async def call(app: ASGIApp, scope: Scope, body: bytes) -> tuple[int, dict[str, str], bytes, bool]:
    """The status, the headers, the body, and whether the body is whole: it is cut off at MAX_REPLY_BYTES."""
    status, size, is_whole = 500, 0, True
    headers: dict[str, str] = {}
    chunks: list[bytes] = []
    requested = [{"type": "http.request", "body": body, "more_body": False}]
    gone = asyncio.Event()

    async def receive() -> Message:
        if requested:
            return requested.pop()
        await gone.wait()  # never: the request lives as long as the handler
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal status, size, is_whole
        if message["type"] == "http.response.start":
            status = message["status"]
            for name, value in message.get("headers", []):
                key = name.decode("latin-1").lower()
                text = value.decode("latin-1")
                headers[key] = f"{headers[key]}, {text}" if key in headers else text
        elif message["type"] == "http.response.body":
            if scope["method"] == "HEAD":
                return  # over HTTP the server leaves it out
            size += len(message.get("body", b""))
            if size > MAX_REPLY_BYTES:
                is_whole = False
            elif message.get("body"):
                chunks.append(message["body"])

    await app(scope, receive, send)
    headers.pop("content-length", None)
    return status, headers, b"".join(chunks) if is_whole else b"", is_whole


def reply(reply_to: int | str | None, status: int, headers: Mapping[str, str], body: bytes, is_whole: bool) -> bytes:
    """The frame. A body that is no JSON is a text; one that is too large is left out, and `error` says so."""
    media_type = headers.get("content-type", "").partition(";")[0].strip()
    if not body:
        encoded = b"null"
    elif media_type == "application/json" or media_type.endswith("+json"):
        encoded = body
    else:
        encoded = orjson.dumps(body.decode(errors="replace"))
    error = b""
    if not is_whole:
        detail = f"The body is larger than {MAX_REPLY_BYTES} bytes; the request was done. Ask for a smaller page."
        error = b',"error":' + orjson.dumps({"code": "reply_too_large", "detail": detail})
    return b'{"reply_to":%s,"status":%d,"headers":%s,"body":%s%s}' % (
        orjson.dumps(reply_to),
        status,
        orjson.dumps(dict(headers)),
        encoded,
        error,
    )
