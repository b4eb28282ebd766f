"""The limits on websocket clients: connections, messages, and the time to authenticate."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from core.errors import CLOSE_REASONS, CloseCode
from realtime.sockets.actions import Request
from realtime.sockets.parsing import MAX_BURST_MESSAGES, MAX_REFUSED_MESSAGES, Bucket
from realtime.sockets.rest_calls import MAX_REQUESTS_IN_FLIGHT, MAX_UNREAD_REPLIES, RestCalls
from tests.support.backends import SQLITE_ONLY
from tests.support.raw_http import HANDSHAKE, raw_connection
from tests.support.service import Service, eventually
from tests.support.sockets import closing, refusal, signed_in


@SQLITE_ONLY
async def test_connections_are_limited(new_service: Callable[..., Service]) -> None:
    service = new_service(MAX_CONNECTIONS="2").start()
    async with service.watch(), service.watch():
        status, body = await refusal(service)
        assert (status, body["detail"]) == (503, "Too many connections")


@SQLITE_ONLY
async def test_limits_can_be_turned_off(new_service: Callable[..., Service]) -> None:
    service = new_service(MAX_CONNECTIONS_PER_ADDRESS="1", RATE_LIMITS="off").start()
    async with service.watch(), service.watch() as watcher:
        for number in range(MAX_BURST_MESSAGES * 2):
            await watcher.send({"id": number, "action": "ping"})
        for number in range(MAX_BURST_MESSAGES * 2):
            assert (await watcher.next())["reply_to"] == number


@SQLITE_ONLY
async def test_a_flood_of_messages_is_refused_and_then_the_socket_is_closed(
    new_service: Callable[..., Service],
) -> None:
    async with new_service(RATE_LIMITS="on").start().watch() as watcher:
        replies = []

        async def read() -> int | None:
            with suppress(ConnectionClosed):
                while True:
                    replies.append(json.loads(await watcher.socket.recv()))
            return watcher.socket.close_code

        async def flood() -> None:
            with suppress(ConnectionClosed):
                for number in range(20_000):
                    await watcher.send({"id": number, "action": "ping"})

        code, _ = await asyncio.gather(read(), flood())
        assert code == CloseCode.TOO_MANY_MESSAGES
        assert len([reply for reply in replies if reply["ok"]]) >= MAX_BURST_MESSAGES
        assert {reply["error"]["code"] for reply in replies if not reply["ok"]} == {"rate_limited"}


async def flood(service: Service, frames: bytes, number: int) -> tuple[int, int]:
    """Send frames without reading; return by how many bytes the service's memory grew, and how many bytes it sent."""
    text = HANDSHAKE.format(target="/ws?topics=characters", headers="")
    async with raw_connection(service, text, keeps=2**14) as connection:
        await connection.head()
        transport: Any = connection.writer.transport
        transport.pause_reading()
        before = service.memory_bytes()
        await connection.send_all(frames * number)
        async with service.anyone() as client:
            assert (await client.get("/healthz")).status_code == 200  # by now, the service has read the frames
        grown = service.memory_bytes() - before
        transport.resume_reading()
        answered = 0
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(1):
                while data := await connection.reader.read(2**16):
                    answered += len(data)
        return grown, answered


PING = b"\x89\xfd" + bytes(4) + b"p" * 125
PONG = b"\x8a\xfd" + bytes(4) + b"p" * 125
EMPTY_PART = b"\x00\x80" + bytes(4)


@SQLITE_ONLY
async def test_pings_are_not_answered_into_a_full_buffer(new_service: Callable[..., Service]) -> None:
    """A client sends 40 MB of pings and does not read. The pongs must not pile up in the server's memory."""
    service = new_service(RATE_LIMITS="off").start()
    grown, answered = await flood(service, PING, 300_000)
    assert answered > 2**16
    assert grown < 6 * 2**20


@SQLITE_ONLY
async def test_parts_without_content_are_not_kept(new_service: Callable[..., Service]) -> None:
    service = new_service(RATE_LIMITS="off").start()
    grown, _ = await flood(service, b"\x01\x80" + bytes(4) + EMPTY_PART * 1_000, 2_000)
    assert grown < 6 * 2**20


@SQLITE_ONLY
@pytest.mark.parametrize(("frame", "pongs"), [(PING, MAX_BURST_MESSAGES), (PONG, 0)])
async def test_control_frames_count_as_messages(new_service: Callable[..., Service], frame: bytes, pongs: int) -> None:
    reason = CLOSE_REASONS[CloseCode.TOO_MANY_MESSAGES].encode()
    service = new_service(RATE_LIMITS="on").start()
    async with raw_connection(service, HANDSHAKE.format(target="/ws?topics=characters", headers="")) as connection:
        await connection.head()
        await connection.send_all(frame * 2 * (MAX_BURST_MESSAGES + MAX_REFUSED_MESSAGES))
        received = await connection.reader.read(-1)
        answered = received.count(b"\x8a\x7d" + b"p" * 125)
        assert pongs <= answered < pongs + 500, "expected the burst and what the bucket gained in the meantime"
        assert received.endswith(b"\x88" + bytes([2 + len(reason)]) + CloseCode.TOO_MANY_MESSAGES.to_bytes(2) + reason)


async def test_requests_of_a_client_that_does_not_read_wait_instead_of_holding_replies() -> None:
    begun: list[str] = []
    written: list[bytes] = []
    can_write = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        begun.append(scope["path"])
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b'"' + b"x" * 700_000 + b'"'})

    scope = {"headers": [], "scheme": "ws", "state": {}}
    websocket: Any = SimpleNamespace(app=app, scope=scope)
    writer: Any = SimpleNamespace(drained=can_write.wait)
    calls = RestCalls(websocket, writer, written.append)
    for number in range(MAX_REQUESTS_IN_FLIGHT):
        calls.start(number, Request(method="GET", path=f"/{number}"), None)
    for _ in range(100):
        await asyncio.sleep(0)
    assert (begun, written) == ([f"/{number}" for number in range(MAX_UNREAD_REPLIES)], [])
    can_write.set()
    await eventually(lambda: len(written) == MAX_REQUESTS_IN_FLIGHT, "the client has all replies")
    await calls.finish()
    assert len(begun) == MAX_REQUESTS_IN_FLIGHT


async def test_calls_that_have_not_begun_end_with_their_socket() -> None:
    begun: list[str] = []
    can_end = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        begun.append(scope["path"])
        await can_end.wait()
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    websocket: Any = SimpleNamespace(app=app, scope={"headers": [], "scheme": "ws", "state": {}})
    writer: Any = SimpleNamespace(drained=lambda: asyncio.sleep(0))
    written: list[bytes] = []
    calls = RestCalls(websocket, writer, written.append)
    for number in range(MAX_REQUESTS_IN_FLIGHT):
        calls.start(number, Request(method="GET", path=f"/{number}"), None)
    await eventually(lambda: len(begun) == MAX_UNREAD_REPLIES, "MAX_UNREAD_REPLIES requests have begun")
    finishing = asyncio.create_task(calls.finish())
    await asyncio.sleep(0)
    can_end.set()
    async with asyncio.timeout(5):
        await finishing
    assert len(begun) == MAX_UNREAD_REPLIES


def test_a_bucket_refills() -> None:
    bucket = Bucket(0.0)
    assert all(bucket.take(0.0) for _ in range(MAX_BURST_MESSAGES))
    assert not bucket.take(0.0)
    assert not bucket.take(0.001)
    assert bucket.take(0.0025)
    assert not bucket.take(0.0026)
    assert bucket.refused == 3, "an occasional accepted message does not reset the count"
    assert sum(bucket.take(1_000.0) for _ in range(2 * MAX_BURST_MESSAGES)) == MAX_BURST_MESSAGES


@SQLITE_ONLY
async def test_a_service_may_require_authentication(new_service: Callable[..., Service]) -> None:
    service = new_service(WEBSOCKET_AUTH="required").start()
    async with service.person() as alice, service.watch() as late, service.watch() as never:
        movie = await alice.add()
        reply = await late.ask({"id": 1, "action": "subscribe"})
        assert reply["error"]["code"] == "unauthenticated"
        assert (await late.ask({"id": 2, "action": "auth", "token": alice.token}))["ok"]
        await late.sees(movie)  # the stream starts at the position of the welcome
        async with service.watch(**signed_in(alice)) as direct:
            assert direct.welcome["data"]["user_id"] == alice.id
            await direct.sees(await alice.add())
        assert (await closing(never))[0] == CloseCode.TOKEN_EXPIRED
        assert never.events == []


@SQLITE_ONLY
async def test_open_connections_from_one_address_are_limited(new_service: Callable[..., Service]) -> None:
    service = new_service(MAX_CONNECTIONS_PER_ADDRESS="2", RATE_LIMITS="on").start()
    for number in range(6):
        async with connect_when_there_is_room(service) as socket:
            if number % 2:
                await socket.close()
            else:
                socket.transport.abort()
    assert (await refusal(service, "?topics=planets"))[0] == 422
    async with connect_when_there_is_room(service), connect_when_there_is_room(service):
        status, body = await refusal(service)
        assert (status, body["detail"]) == (429, "Too many connections from 127.0.0.1")


@asynccontextmanager
async def connect_when_there_is_room(service: Service) -> AsyncIterator[ClientConnection]:
    """Connect as soon as the limit allows it, which may be a moment after another socket has closed."""

    async def attempt() -> ClientConnection | None:
        try:
            return await connect(service.ws_url)
        except InvalidStatus as refused:
            assert refused.response.status_code == 429
            return None

    socket = await eventually(attempt, "there is room")
    yield socket
    await socket.close()
