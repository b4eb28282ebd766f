"""A request waits a moment for its body before it starts, so that its client is identified only once."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from server import http_budgets
from server.http_connections import HttpConnections
from server.http_protocol import MarqueeHTTPProtocol
from tests.support.service import eventually

LONG_SECONDS = 600.0


class App:
    """An application that answers when it has read a whole body. `started` has the first message of each request."""

    def __init__(self) -> None:
        self.started: list[tuple[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        reading = asyncio.create_task(receive())
        await asyncio.sleep(0)  # a message that has arrived is returned without waiting
        self.started.append((scope["path"], reading.result() if reading.done() else None))
        message = await reading
        while message.get("more_body"):
            message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})


@asynccontextmanager
async def serving(app: App) -> AsyncIterator[tuple[str, int]]:
    """Serve the application, and yield the address."""
    connections = HttpConnections(max_connections=10, max_per_address=None, is_trusted=lambda host: False)

    def protocol(**given: Any) -> MarqueeHTTPProtocol:
        return MarqueeHTTPProtocol(**{**given, "app_state": {"http_connections": connections}})

    options: Any = {"http": protocol, "interface": "asgi3", "lifespan": "off", "log_config": None}
    server = uvicorn.Server(uvicorn.Config(app, **options))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = asyncio.create_task(server._serve([listener]))
        await eventually(lambda: server.started, "the server listens")
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = server.force_exit = True
            await running


def head(path: str, body_bytes: int, method: str = "POST") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {body_bytes}\r\n\r\n".encode()


async def test_a_request_starts_with_its_whole_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_budgets, "BODY_HEADSTART_SECONDS", LONG_SECONDS)
    app = App()
    async with serving(app) as address:
        reader, writer = await asyncio.open_connection(*address)
        other_reader, other_writer = await asyncio.open_connection(*address)
        for path in ("/first", "/second"):
            writer.write(head(path, 2))
            writer.write(b"{")
            # A request that can start does so meanwhile.
            other_writer.write(head("/other", 0))
            await other_reader.readuntil(b"\r\n\r\n")
            assert path not in dict(app.started)
            writer.write(b"}")
            await reader.readuntil(b"\r\n\r\n")
            assert dict(app.started)[path] == {"type": "http.request", "body": b"{}", "more_body": False}
        writer.write(head("/sent", 2) + b"{}" + head("/ahead", 2))
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"{}")
        await reader.readuntil(b"\r\n\r\n")
        assert dict(app.started)["/ahead"]["body"] == b"{}"
        writer.close()
        other_writer.close()


async def test_a_request_does_not_wait_long_for_its_body() -> None:
    app = App()
    async with serving(app) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(head("/late", 2))
        await eventually(lambda: len(app.started) == 1, "the request has started")
        assert app.started == [("/late", None)]
        writer.write(b"{}")
        await reader.readuntil(b"\r\n\r\n")
        writer.close()


@pytest.mark.parametrize(
    "request_",
    [
        b"DELETE /row HTTP/1.1\r\nHost: localhost\r\n\r\n",
        head("/list", 2, "GET"),
        head("/expect", 2).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"),
        head("/large", 10 * HIGH_WATER_LIMIT) + b"x" * (HIGH_WATER_LIMIT + 1),
    ],
    ids=["no body", "GET", "Expect", "large body"],
)
async def test_a_request_starts_at_once_if_waiting_is_useless(request_: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_budgets, "BODY_HEADSTART_SECONDS", LONG_SECONDS)
    app = App()
    async with serving(app) as address:
        _, writer = await asyncio.open_connection(*address)
        writer.write(request_)
        await eventually(lambda: len(app.started) == 1, "the request has started")
        writer.close()


@pytest.mark.parametrize("end", [b"ZZ\r\n", b""], ids=["invalid", "closed"])
async def test_a_request_that_is_rejected_or_abandoned_before_its_start_never_starts(
    end: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_budgets, "BODY_HEADSTART_SECONDS", 0.05)
    app = App()
    async with serving(app) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"DELETE /row HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + end)
        if not end:
            writer.write_eof()
        assert (await reader.read()).startswith(b"HTTP/1.1 400 " if end else b"")
        # This request would start after the other one.
        _, later = await asyncio.open_connection(*address)
        later.write(head("/other", 2))
        await eventually(lambda: "/other" in dict(app.started), "the other request has started")
        assert dict(app.started).keys() == {"/other"}
        writer.close()
        later.close()
