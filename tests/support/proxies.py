"""Faults from outside: TCP proxies on 127.0.0.1 that cut connections, and one for Redis that loses pub/sub messages.

The proxies of one `Proxies` run in a thread with its own event loop, so that a test that blocks its event loop does not
hold up the services behind the proxies. All methods may be called from any thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

import uvloop

HOST = "127.0.0.1"
CALL_SECONDS = 10.0
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
MESSAGE_PUSHES = (b">3\r\n$7\r\nmessage\r\n", b"*3\r\n$7\r\nmessage\r\n")  # RESP3, RESP2

T = TypeVar("T")
AnyProxy = TypeVar("AnyProxy", bound="Proxy")


class Proxies:
    """The thread that runs the proxies. It creates them, and closes all of them at the end of its `with` block."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies", daemon=True)
        self._made: list[Proxy] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for proxy in self._made:
            proxy.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_SECONDS)
        self._loop.close()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` in the proxies' event loop, and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_SECONDS)

    def cutting(self, port: int) -> Proxy:
        """Return a proxy in front of the server on `port`."""
        return self._begin(Proxy(self, port))

    def redis(self, port: int, seed: int = 0, drop: float = 0.0) -> RedisProxy:
        """Return a proxy in front of the Redis on `port`; it loses the fraction `drop` of the pub/sub messages."""
        return self._begin(RedisProxy(self, port, seed, drop))

    def _begin(self, proxy: AnyProxy) -> AnyProxy:
        self.call(proxy.listen())
        self._made.append(proxy)
        return proxy


class Proxy:
    """A TCP proxy that passes on all bytes, and resets connections when `cut` is called."""

    def __init__(self, owner: Proxies, upstream: int) -> None:
        self.upstream = upstream
        self.port = 0
        self.links: set[Link] = set()
        self._owner = owner
        self._server: asyncio.Server | None = None

    async def listen(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Link(self), HOST, 0, backlog=2048)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        async def end() -> None:
            if self._server is not None:
                self._server.close()
            self._cut(1.0, random.Random(0))

        self._owner.call(end())

    def cut(self, fraction: float = 1.0, seed: int = 0) -> int:
        """Reset about `fraction` of the connections at both ends, losing unsent bytes; return their number."""

        async def work() -> int:
            return self._cut(fraction, random.Random(seed))

        return self._owner.call(work())

    def _cut(self, fraction: float, chance: random.Random) -> int:
        chosen = [link for link in list(self.links) if chance.random() < fraction]
        for link in chosen:
            link.cut()
        return len(chosen)

    def reader(self) -> Reader:
        """Return a new object that filters one connection's bytes from upstream."""
        return Reader()


class Reader:
    """Passes on all bytes from upstream."""

    def pass_on(self, data: bytes) -> bytes:
        return data


class RedisProxy(Proxy):
    """A proxy that loses pub/sub messages: a fraction of them or, while `is_silent` is set, all of them.

    Everything else is passed on, so connections stay open and commands still work, as for a deaf worker.
    """

    def __init__(self, owner: Proxies, upstream: int, seed: int, drop: float) -> None:
        super().__init__(owner, upstream)
        self.drop = drop
        self.is_silent = False
        self.passed = 0
        self.lost = 0
        self._chance = random.Random(seed)

    def reader(self) -> Reader:
        return _LossyReader(self)

    def loses_next(self) -> bool:
        """Return whether the next message is to be lost, and count the message."""
        lost = self._chance.random() < self.drop or self.is_silent
        if lost:
            self.lost += 1
        else:
            self.passed += 1
        return lost


class _LossyReader(Reader):
    def __init__(self, proxy: RedisProxy) -> None:
        self._proxy = proxy
        self._rest = b""

    def pass_on(self, data: bytes) -> bytes:
        data = self._rest + data
        kept, start = [], 0
        while start < len(data) and (end := end_of_value(data, start)) is not None:
            if not (data.startswith(MESSAGE_PUSHES, start) and self._proxy.loses_next()):
                kept.append(data[start:end])
            start = end
        self._rest = data[start:]
        return b"".join(kept)


def end_of_value(data: bytes, start: int) -> int | None:
    """Return the index after the RESP value that begins at `start`, or None if the value is not complete yet."""
    line_end = data.find(b"\r\n", start)
    if line_end < 0:
        return None
    kind, end = data[start : start + 1], line_end + 2
    if kind in (b"$", b"=", b"!"):
        length = int(data[start + 1 : line_end])
        end += length + 2 if length >= 0 else 0
        return end if end <= len(data) else None
    if kind in (b"*", b"~", b">", b"%", b"|"):
        count = int(data[start + 1 : line_end]) * (2 if kind in (b"%", b"|") else 1)
        for _ in range(max(0, count)):
            inner = end_of_value(data, end)
            if inner is None:
                return None
            end = inner
    return end


class Link(asyncio.Protocol):
    """A client's connection, and the proxy's connection to the upstream server for this client."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._client: Any = None
        self._upstream: Any = None
        self._early: list[bytes] = []  # what the client sent before the upstream connection was open
        self._connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self._client = transport
        self._proxy.links.add(self)
        self._connecting = asyncio.create_task(self._connect())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._upstream, _ = await loop.create_connection(
                lambda: _Upstream(self, self._proxy.reader()), HOST, self._proxy.upstream
            )
        except OSError:
            self.end()
            return
        if self._client.is_closing():
            self.end()
        else:
            self._upstream.write(b"".join(self._early))
            self._early.clear()

    def data_received(self, data: bytes) -> None:
        if self._upstream is None:
            self._early.append(data)
        elif not self._upstream.is_closing():
            self._upstream.write(data)

    def pause_writing(self) -> None:
        _pause(self._upstream)

    def resume_writing(self) -> None:
        _resume(self._upstream)

    def connection_lost(self, error: Exception | None) -> None:
        self.end()

    def to_client(self, data: bytes) -> None:
        if not self._client.is_closing():
            self._client.write(data)

    def pause_client(self) -> None:
        _pause(self._client)

    def resume_client(self) -> None:
        _resume(self._client)

    def end(self) -> None:
        """Close both sides cleanly: bytes that were read are still sent."""
        self._proxy.links.discard(self)
        for transport in (self._client, self._upstream):
            if transport is not None:
                transport.close()

    def cut(self) -> None:
        """Reset both sides, as a broken network does."""
        self._proxy.links.discard(self)
        for transport in (self._client, self._upstream):
            if transport is None:
                continue
            with contextlib.suppress(OSError, AttributeError):
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            transport.abort()


class _Upstream(asyncio.Protocol):
    def __init__(self, link: Link, reader: Reader) -> None:
        self._link = link
        self._reader = reader

    def data_received(self, data: bytes) -> None:
        passed = self._reader.pass_on(data)
        if passed:
            self._link.to_client(passed)

    def pause_writing(self) -> None:
        self._link.pause_client()

    def resume_writing(self) -> None:
        self._link.resume_client()

    def connection_lost(self, error: Exception | None) -> None:
        self._link.end()


def _pause(transport: Any) -> None:
    if transport is not None and not transport.is_closing():
        transport.pause_reading()


def _resume(transport: Any) -> None:
    if transport is not None and not transport.is_closing():
        transport.resume_reading()
