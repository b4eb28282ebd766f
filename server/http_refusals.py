"""The responses that the server sends without calling the application."""

from __future__ import annotations

from collections.abc import Iterable

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

RETRY_AFTER_SECONDS = 5


def refusal(status: int, detail: str, default_headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the whole response. It tells the client that the connection will be closed."""
    body = orjson.dumps({"detail": detail})
    headers = [
        *default_headers,
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"connection", b"close"),
        *([(b"retry-after", b"%d" % RETRY_AFTER_SECONDS)] if status == 503 else []),
    ]
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    return STATUS_LINE[status] + lines + b"\r\n" + body
