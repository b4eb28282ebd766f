"""Event streams over time, tested without a service: heartbeats, clients that stop reading, the limit on streams."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from core.errors import TooManyRequests, Unavailable
from core.identity import Identity
from core.scope_keys import ABORT
from realtime.feed.feed import Feed
from realtime.sockets.places import Places
from realtime.sockets.registry import Registry
from realtime.sse.event_stream import MAX_STREAMS, EventStreams, Pace
from realtime.sse.replay import Replay
from repository.engine import event_log
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from routes.events import EventsQuery
from server.http_connections import HttpConnections
from server.http_protocol import MarqueeHTTPProtocol
from tests.support.service import eventually


class Client:
    """The client of an ASGI response. It reads everything until `stops` is set or `leave()` is called."""

    def __init__(self, address: str = "test") -> None:
        self.address = address
        self.text = ""
        self.chunks: list[tuple[str, float]] = []  # with the seconds since the chunk before
        self.status: int | None = None
        self.is_over = False
        self.was_cut = False
        self.stops = False
        self._gone = asyncio.Event()
        self._got_at = time.monotonic()

    @property
    def scope(self) -> dict[str, Any]:
        return {"type": "http", "method": "GET", "client": (self.address, 1), "extensions": {ABORT: self._cut}}

    async def gets(self, text: str, times: int = 1) -> None:
        await eventually(lambda: self.text.count(text) >= times, f"the client gets {text}")

    def leave(self) -> None:
        self._gone.set()

    def _cut(self) -> None:
        self.was_cut = True
        self.leave()

    async def receive(self) -> Any:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self.stops:
            await asyncio.Event().wait()
        self.status = message.get("status", self.status)
        text, now = message.get("body", b"").decode(), time.monotonic()
        self.text += text
        self.chunks.append((text, now - self._got_at))
        self._got_at = now
        self.is_over = message["type"] == "http.response.body" and not message.get("more_body", False)


class Streams:
    """Event streams over a running feed, without a service."""

    def __init__(self, database: Database, feed: Feed, pace: Pace) -> None:
        async def recheck(identity: Identity) -> Identity:
            return identity

        registry, places = Registry(recheck), Places(max_connections=10_000, max_per_address=None)
        self.database = database
        self.feed = feed
        self.all = EventStreams(Replay(database, feed), registry, places, pace)
        self.running: set[asyncio.Task[None]] = set()

    async def serve(self, scope: Any, receive: Any, send: Any) -> None:
        await self.all.stream(None, EventsQuery(), None)(scope, receive, send)

    def open(self, client: Client) -> asyncio.Task[None]:
        running = asyncio.create_task(self.serve(client.scope, client.receive, client.send))
        self.running.add(running)
        return running

    async def opened(self) -> tuple[Client, asyncio.Task[None]]:
        """Open a stream, wait for its welcome, and return its client and its task."""
        client = Client()
        serving = self.open(client)
        await client.gets("welcome")
        return client, serving

    async def write(self, audience: str, title: str = "a movie") -> None:
        async def work(tx: Transaction) -> None:
            tx.emit("movies", "add", {"id": 1, "title": title}, actor_id=None, audience=audience)

        await self.database.write(work)


@asynccontextmanager
async def streams(database: Database, **pace: float) -> AsyncIterator[Streams]:
    feed = Feed(database, has_shared_bus=False, is_bus_deaf=lambda: False)
    await feed.start()
    running = asyncio.create_task(feed.run())
    found = Streams(database, feed, Pace(**pace))
    try:
        yield found
    finally:
        found.all.stop()
        running.cancel()
        await asyncio.gather(running, *found.running, return_exceptions=True)


async def test_a_silent_stream_sends_heartbeats_with_its_position(database: Database) -> None:
    async with streams(database, heartbeat_seconds=0.05) as found:
        client, _ = await found.opened()
        epoch = found.feed.head.epoch
        await client.gets(f": heartbeat\nid: {epoch}:0\n\n", times=3)
        await found.write("user:7")
        await client.gets(f": heartbeat\nid: {epoch}:1\n\n")
        await found.write("public")
        await client.gets(f"\nid: {epoch}:2\ndata: ")
        assert "user:7" not in client.text
        assert client.text.count("data: ") == 2


async def test_a_busy_stream_sends_no_heartbeats(database: Database) -> None:
    async with streams(database, heartbeat_seconds=0.2) as found:
        client, _ = await found.opened()
        until = time.monotonic() + 1
        while time.monotonic() < until:
            await found.write("public")
        heartbeats = [pause for text, pause in client.chunks if ": heartbeat" in text]
        assert len(client.chunks) > len(heartbeats) + 2
        assert all(pause >= 0.2 for pause in heartbeats), "only a disk or machine that stalls may cause one"


async def test_a_client_that_stops_reading_is_cut_off(database: Database) -> None:
    async with streams(database, heartbeat_seconds=0.05, write_seconds=0.3) as found:
        slow, serving = await found.opened()
        good, _ = await found.opened()
        slow.stops = True
        await asyncio.wait_for(serving, 10)
        assert slow.was_cut
        assert not slow.is_over
        assert len(found.all) == 1
        await found.write("public")
        await good.gets('"operation":"add"')


async def test_the_server_drops_a_connection_that_reads_nothing(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async with streams(database, write_seconds=0.3) as found:
        listener = socket.create_server(("127.0.0.1", 0))
        connections = HttpConnections(max_connections=10, max_per_address=None, is_trusted=lambda host: False)

        def protocol(**given: Any) -> MarqueeHTTPProtocol:
            return MarqueeHTTPProtocol(**{**given, "app_state": {"http_connections": connections}})

        options: Any = {"http": protocol, "interface": "asgi3", "lifespan": "off", "log_config": None}
        server = uvicorn.Server(uvicorn.Config(found.serve, **options))
        serving = asyncio.create_task(server._serve([listener]))
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        try:
            await eventually(lambda: server.started, "the server listens")
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, listener.getsockname())
            await loop.sock_sendall(client, b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await eventually(lambda: len(found.all) == 1, "the stream is open")
            open_ = server.server_state.connections
            for _ in range(40):
                await found.write("public", "x" * 500_000)
                if not open_:
                    break
            await eventually(lambda: not open_, "the connection is dropped", 10)
            await eventually(lambda: not server.server_state.tasks, "the request has ended", 5)
            assert len(found.all) == 0
            assert not [record for record in caplog.records if record.levelname == "ERROR"], caplog.text
        finally:
            client.close()
            server.should_exit = True
            await serving


async def test_nothing_is_kept_of_a_client_that_disconnects(database: Database) -> None:
    async with streams(database) as found:
        client, serving = await found.opened()
        assert len(found.all) == 1
        client.leave()
        await asyncio.wait_for(serving, 5)
        assert len(found.all) == 0
        assert not client.was_cut


async def test_the_number_of_streams_is_limited(database: Database) -> None:
    async with streams(database) as found:
        clients = [Client() for _ in range(MAX_STREAMS)]
        serving = [found.open(client) for client in clients]
        await eventually(lambda: all(client.text for client in clients), "all streams are open")
        with pytest.raises(Unavailable) as refused:
            await found.open(Client())
        assert refused.value.status == 503
        assert refused.value.headers["Retry-After"] == "5"
        await found.write("public")
        for client in clients:
            await client.gets('"operation":"add"')
        clients[0].leave()
        await serving[0]
        await found.opened()  # a new stream is accepted again
        found.all.stop()
        await asyncio.gather(*serving)
        assert all(client.is_over for client in clients[1:])
        with pytest.raises(Unavailable):
            await found.open(Client())


async def test_one_network_has_at_most_a_quarter_of_the_streams(database: Database) -> None:
    async with streams(database) as found:
        places = Places(max_connections=100, max_per_address=100)
        found.all = EventStreams(found.all.source, found.all.registry, places, found.all.pace, max_streams=8)
        clients = [Client("2001:db8:0:1::1"), Client("2001:db8:0:1:ffff::2"), Client("192.0.2.1"), Client("192.0.2.1")]
        serving = [found.open(client) for client in clients]
        await eventually(lambda: all(client.text for client in clients), "all streams are open")
        for address, network in (("2001:db8:0:1::3", "2001:db8:0:1::/64"), ("::ffff:192.0.2.1", "192.0.2.1")):
            with pytest.raises(TooManyRequests, match=f"at most 2 event streams from {network}") as refused:
                await found.open(Client(address))
            assert refused.value.headers["Retry-After"] == "5"
        clients[0].leave()
        await serving[0]
        again = Client("2001:db8:0:1::3")
        found.open(again)
        await again.gets("welcome")


async def test_a_stream_gets_a_resync_when_the_log_is_replaced(database: Database) -> None:
    async with streams(database) as found:
        client, _ = await found.opened()
        await found.write("public")
        await client.gets('"operation":"add"')
        epoch = await event_log.renew_epoch(database)
        await client.gets("the log was replaced")
        assert f"id: {epoch}:1\n" in client.text
        await found.write("public")
        await client.gets(f"id: {epoch}:2\n")
