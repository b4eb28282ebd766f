"""Raw HTTP connections, for clients that behave as no library does: silent, slow, endless or deaf."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from tests.support.service import Service

HANDSHAKE = (
    "GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{headers}\r\n"
)


@dataclass(frozen=True)
class Answer:
    """What a connection received until it was closed; `status` is 0 if it received nothing."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float  # how long the connection was open

    @property
    def detail(self) -> Any:
        return json.loads(self.body)["detail"]


@dataclass
class RawConnection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    started: float = field(default_factory=time.monotonic)

    def send(self, data: str | bytes) -> None:
        self.writer.write(data.encode() if isinstance(data, str) else data)

    async def send_all(self, data: bytes) -> None:
        """Send all data before reading. It is no error if the server closes the connection in the meantime."""
        with suppress(ConnectionError):
            self.writer.write(data)
            await self.writer.drain()

    def is_alone(self) -> bool:
        """Return whether the server has closed or reset the connection, as far as this side knows."""
        return self.reader.at_eof() or self.reader.exception() is not None

    async def head(self) -> str:
        """Read one response up to the end of its headers, and return its status line."""
        return (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[0]

    async def answer(self, seconds: float = 30.0) -> Answer:
        """Return what arrives until the server closes the connection. Raise ConnectionError if the server resets it."""
        async with asyncio.timeout(seconds):
            received = await self.reader.read(-1)
        took = time.monotonic() - self.started
        if not received:
            return Answer(0, {}, b"", took)
        head, _, body = received.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        return Answer(int(first.split()[1]), headers, body, took)


@asynccontextmanager
async def raw_connection(
    service: Service, text: str | bytes = b"", *, address: str = "127.0.0.1", keeps: int | None = None
) -> AsyncIterator[RawConnection]:
    """Connect from `address`, which must be one of this machine's addresses, and send `text`.

    With `keeps`, the client's side buffers only about this many bytes that the test has not read.
    """
    socket_ = socket.socket()
    socket_.bind((address, 0))
    if keeps is not None:
        # Set this before connecting, or the kernel lets the buffer grow to tens of megabytes.
        socket_.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, keeps)
    socket_.setblocking(False)
    await asyncio.get_running_loop().sock_connect(socket_, ("127.0.0.1", service.port))
    reader, writer = await asyncio.open_connection(sock=socket_, limit=keeps or 2**26)
    connection = RawConnection(reader, writer)
    try:
        connection.send(text)
        yield connection
    finally:
        writer.transport.abort()
