"""HTTP connections: the limits on their number, in total and per address, and the memory of closed ones."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from server.http_connections import MAX_LINGERING_REFUSALS, HttpConnections
from server.http_protocol import MarqueeHTTPProtocol
from server.websocket_protocol import MarqueeWebSocketProtocol
from tests.support.backends import SQLITE_ONLY
from tests.support.metrics import metric
from tests.support.raw_http import HANDSHAKE, Answer, raw_connection
from tests.support.service import Service, eventually

LAST = "GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"


async def asked(service: Service, text: str = LAST, address: str = "127.0.0.1") -> Answer:
    async with raw_connection(service, text, address=address) as connection:
        return await connection.answer()


# --- limits


@SQLITE_ONLY
async def test_connections_from_one_address_are_limited(new_service: Callable[..., Service]) -> None:
    settings = {"RATE_LIMITS": "on", "TRUSTED_PROXIES": "127.0.0.3"}
    service = new_service(MAX_HTTP_CONNECTIONS_PER_ADDRESS="3", MAX_HTTP_CONNECTIONS="5", **settings).start()
    async with AsyncExitStack() as stack:
        for _ in range(3):
            await stack.enter_async_context(raw_connection(service, address="127.0.0.2"))
        refused = await eventually(lambda: asked_and_refused(service), "the connections are counted")
        assert refused.detail == "Too many connections from 127.0.0.2"
        assert refused.headers["retry-after"] == "5"
        assert refused.headers["connection"] == "close"
        assert refused.seconds < 2
        # Other addresses are not affected.
        assert (await asked(service)).status == 200
        for _ in range(2):
            await stack.enter_async_context(raw_connection(service, address="127.0.0.3"))
        refused = await eventually(lambda: asked_and_refused(service, "127.0.0.1"), "all connections are counted")
        assert refused.detail == "Too many connections"
    assert (await eventually(lambda: answered(service), "closed connections are not counted")).status == 200
    async with AsyncExitStack() as stack:
        for _ in range(4):
            await stack.enter_async_context(raw_connection(service, address="127.0.0.3"))
        assert (await asked(service, address="127.0.0.3")).status == 200, (
            "the limit per address does not apply to a trusted proxy"
        )
    assert await metric(service, "marquee_http_connections_refused_total", reason="limit") >= 2
    assert service.log().count('"event": "connections refused"') == 1


async def asked_and_refused(service: Service, address: str = "127.0.0.2") -> Answer | None:
    answer = await asked(service, address=address)
    return answer if answer.status == 503 else None


async def answered(service: Service) -> Answer | None:
    answer = await asked(service)
    return answer if answer.status == 200 else None


@SQLITE_ONLY
async def test_a_websocket_is_no_http_connection(new_service: Callable[..., Service]) -> None:
    service = new_service(MAX_HTTP_CONNECTIONS_PER_ADDRESS="2", RATE_LIMITS="on").start()
    async with service.watch(), service.watch(), service.watch():
        assert (await asked(service)).status == 200


@SQLITE_ONLY
async def test_one_address_has_at_most_a_quarter_of_the_event_streams(new_service: Callable[..., Service]) -> None:
    service = new_service(MAX_CONNECTIONS="8", RATE_LIMITS="on").start()
    stream = "GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\nConnection: close\r\n\r\n"
    async with AsyncExitStack() as stack:
        for _ in range(2):
            one = await stack.enter_async_context(raw_connection(service, stream, address="127.0.0.2"))
            assert b" 200 " in await one.reader.readline()
        refused = await asked(service, stream, "127.0.0.2")
        assert refused.status == 429
        assert refused.headers["retry-after"] == "5"
        assert refused.detail == "Expected at most 2 event streams from 127.0.0.2; close one first"
        other = await stack.enter_async_context(raw_connection(service, stream, address="127.0.0.3"))
        assert b" 200 " in await other.reader.readline(), "other addresses are not affected"
        assert (await asked(service, address="127.0.0.2")).status == 200


def test_refused_connections_linger_in_small_numbers_and_networks_count_as_one_address() -> None:
    connections = HttpConnections(max_connections=10, max_per_address=2, is_trusted=lambda host: host == "2001:db8::1")
    assert connections.enter("2001:db8:0:1::1") is None
    assert connections.enter("2001:db8:0:1:ffff::2") is None
    assert connections.enter("2001:db8:0:1::3") == "Too many connections from 2001:db8:0:1::/64"
    assert connections.enter("2001:db8:0:2::1") is None
    assert [connections.enter("2001:db8::1") for _ in range(4)] == [None] * 4
    connections.leave("2001:db8:0:1::2")
    assert connections.enter("2001:db8:0:1::3") is None
    assert len(connections) == 7
    assert [connections.may_linger() for _ in range(MAX_LINGERING_REFUSALS + 1)].count(False) == 1
    connections.lingered()
    assert connections.may_linger()


# --- memory


@pytest.mark.parametrize(
    "request_",
    ["GET / HTTP/1.1\r\nHost: a\r\n\r\n", HANDSHAKE.format(target="/", headers="")],
    ids=["request", "handshake"],
)
async def test_a_closed_connection_does_not_wait_for_the_garbage_collector(request_: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            while (await receive())["type"] != "websocket.disconnect":
                pass
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    config = uvicorn.Config(app, http=MarqueeHTTPProtocol, ws=MarqueeWebSocketProtocol, lifespan="off", log_config=None)
    config.load()
    limits = HttpConnections(max_connections=10, max_per_address=None, is_trusted=lambda address: True)
    protocols: list[weakref.ref[MarqueeHTTPProtocol]] = []

    def connected() -> MarqueeHTTPProtocol:
        protocol = MarqueeHTTPProtocol(config, ServerState(), {"http_connections": limits})
        protocols.append(weakref.ref(protocol))
        return protocol

    server = await asyncio.get_running_loop().create_server(connected, "127.0.0.1", 0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(request_.encode())
            await reader.readuntil(b"\r\n\r\n")
            writer.transport.abort()
        await eventually(lambda: not any(protocol() for protocol in protocols), "all connections are freed")
    finally:
        gc.enable()
        server.close()
