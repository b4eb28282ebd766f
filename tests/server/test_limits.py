"""The limits on websocket clients: connections, messages, and the time to authenticate."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Frame
from websockets.server import ServerProtocol

from core.errors import CLOSE_REASONS, CloseCode
from core.network.shares import Shares
from realtime.sockets import endpoint
from realtime.sockets.actions import Request
from realtime.sockets.parsing import MAX_BURST_MESSAGES, MAX_REFUSED_MESSAGES, Bucket
from realtime.sockets.rest_calls import MAX_REQUESTS_IN_FLIGHT, MAX_UNREAD_REPLIES, RestCalls
from realtime.wire.room import Room
from server import websocket_protocol
from server.websocket_protocol import MAX_CLOSING_BYTES, PIECE_BYTES, SMALL_FRAGMENT_BYTES
from tests.support.backends import SQLITE_ONLY
from tests.support.raw_http import HANDSHAKE, raw_connection
from tests.support.served_here import served_here
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

        def is_answered(number: int) -> bool:
            return len(replies) >= number or reading.done()

        async def flood() -> None:
            with suppress(ConnectionClosed):
                for number in range(20_000):
                    await watcher.send({"id": number, "action": "ping"})
                    # Messages sent after the close frame must not exceed MAX_CLOSING_BYTES.
                    if not is_answered(number - 300):
                        await eventually(partial(is_answered, number - 200), "replies arrive")

        reading = asyncio.create_task(read())
        await flood()
        code = await reading
        assert code == CloseCode.TOO_MANY_MESSAGES
        assert len([reply for reply in replies if reply["ok"]]) >= MAX_BURST_MESSAGES
        assert {reply["error"]["code"] for reply in replies if not reply["ok"]} == {"rate_limited"}


async def flood(service: Service, frames: bytes, number: int) -> tuple[int, int]:
    """Send frames without reading; return by how many bytes the service's memory grew, and how many bytes it sent."""
    async with raw_connection(service, WATCH, keeps=2**14) as connection:
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
BEGIN_TEXT = b"\x01\x81" + bytes(4) + b" "
BEGIN_BYTES = b"\x02\x81" + bytes(4) + b" "
EMPTY_PART = b"\x00\x80" + bytes(4)
SMALL_PART = b"\x00\x81" + bytes(4) + b" "
END = b"\x80\x80" + bytes(4)
SHORT_PING = b"\x89\x80" + bytes(4)
SHORT_PONG = b"\x8a\x00"
WATCH = HANDSHAKE.format(target="/ws?topics=characters", headers="")


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
@pytest.mark.parametrize(
    ("first", "frame", "pongs"),
    [
        (b"", PING, MAX_BURST_MESSAGES),
        (b"", PONG, 0),
        (BEGIN_TEXT, EMPTY_PART, 0),
        (BEGIN_TEXT, SMALL_PART, 0),
        (BEGIN_BYTES, SMALL_PART, 0),
        (b"", BEGIN_TEXT + SMALL_PART + END, 0),
    ],
)
async def test_small_frames_count_as_messages(
    new_service: Callable[..., Service], first: bytes, frame: bytes, pongs: int
) -> None:
    reason = CLOSE_REASONS[CloseCode.TOO_MANY_MESSAGES].encode()
    service = new_service(RATE_LIMITS="on").start()
    async with raw_connection(service, WATCH) as connection:
        await connection.head()
        await connection.send_all(first + frame * 4 * (MAX_BURST_MESSAGES + MAX_REFUSED_MESSAGES))
        received = await connection.reader.read(-1)
        answered = received.count(b"\x8a\x7d" + b"p" * 125)
        assert pongs <= answered < pongs + 500, "expected the burst, and what the bucket has gained since"
        assert received.endswith(b"\x88" + bytes([2 + len(reason)]) + CloseCode.TOO_MANY_MESSAGES.to_bytes(2) + reason)


@SQLITE_ONLY
async def test_large_fragments_do_not_count(new_service: Callable[..., Service]) -> None:
    async with new_service(RATE_LIMITS="on").start().watch() as watcher:
        text = json.dumps({"id": 1, "action": "ping"}).ljust(250 * SMALL_FRAGMENT_BYTES)
        parts = [text[at : at + SMALL_FRAGMENT_BYTES] for at in range(0, len(text), SMALL_FRAGMENT_BYTES)]
        for _ in range(2 * (MAX_BURST_MESSAGES + MAX_REFUSED_MESSAGES) // len(parts)):
            await watcher.socket.send(parts)
            assert (await watcher.next())["ok"]


@SQLITE_ONLY
async def test_a_message_in_small_fragments_takes_no_more_memory_than_others(
    new_service: Callable[..., Service],
) -> None:
    service = new_service(RATE_LIMITS="off").start()
    async with raw_connection(service, WATCH) as connection:
        await connection.head()
        before = service.memory_bytes()
        connection.send(b"\x01\x81" + bytes(4) + b"{" + SMALL_PART * 200_000 + SHORT_PING)
        await connection.reader.readuntil(SHORT_PONG)  # by now, the service has read the fragments
        assert service.memory_bytes() - before < 6 * 2**20
        text = b'"id": 7, "action": "ping"}'
        connection.send(b"\x80" + bytes([0x80 + len(text)]) + bytes(4) + text)
        await connection.reader.readuntil(b'"reply_to":7,"ok":true')


@SQLITE_ONLY
async def test_a_message_in_fragments_must_be_complete_in_time(
    new_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websocket_protocol, "MESSAGE_SECONDS", 1.0)
    service = new_service()
    parts = ['{"id": 1, ', '"action": "ping"}']
    async with served_here(service), service.watch() as watcher, raw_connection(service, WATCH) as connection:
        await watcher.socket.send(parts)
        assert (await watcher.next())["ok"]
        await connection.head()
        connection.send(BEGIN_TEXT + SMALL_PART)
        async with asyncio.timeout(10):
            received = await connection.reader.read(-1)
        reason = CLOSE_REASONS[CloseCode.TOO_SLOW].encode()
        assert received.endswith(b"\x88" + bytes([2 + len(reason)]) + CloseCode.TOO_SLOW.to_bytes(2) + reason)
        await watcher.socket.send(parts)
        assert (await watcher.next())["ok"], "a complete message has no deadline"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which the parser adds each frame's opcode."""
    opcodes: list[int] = []
    take = ServerProtocol.recv_frame

    def recv_frame(self: ServerProtocol, frame: Frame) -> None:
        opcodes.append(frame.opcode)
        take(self, frame)

    monkeypatch.setattr(ServerProtocol, "recv_frame", recv_frame)
    return opcodes


@SQLITE_ONLY
@pytest.mark.parametrize("frame", [SMALL_PART, SHORT_PING, b"\x8a\x80" + bytes(4), BEGIN_TEXT + END])
async def test_many_small_frames_are_parsed_in_several_turns(
    new_service: Callable[..., Service], parsed: list[int], frame: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websocket_protocol, "TURN_SECONDS", 0.0)  # parse one piece at a time, on a fast machine too
    service = new_service(RATE_LIMITS="off")
    begin = BEGIN_TEXT if frame == SMALL_PART else b""
    async with served_here(service), raw_connection(service, WATCH) as connection:
        await connection.head()
        connection.send(begin + frame * 50_000)
        most = before = 0
        while len(parsed) < 50_000:
            await asyncio.sleep(0)
            most, before = max(most, len(parsed) - before), len(parsed)
        assert most <= 2 * PIECE_BYTES / len(EMPTY_PART), "expected at most the piece that has arrived and the next one"


@SQLITE_ONLY
async def test_little_is_parsed_after_the_close(new_service: Callable[..., Service], parsed: list[int]) -> None:
    service = new_service(RATE_LIMITS="off")
    async with served_here(service), raw_connection(service, WATCH) as connection:
        await connection.head()
        connection.send(b"\x82\x80" + bytes(4))
        await connection.reader.readuntil(CloseCode.PROTOCOL_ERROR.to_bytes(2))
        for _ in range(20):
            await connection.send_all(SHORT_PING * 10_000)
        assert await connection.reader.read(-1) == CLOSE_REASONS[CloseCode.PROTOCOL_ERROR].encode()
        assert len(parsed) < (MAX_CLOSING_BYTES + PIECE_BYTES) / len(SHORT_PING)


@SQLITE_ONLY
async def test_a_message_sent_before_the_handshake_is_complete_is_handled_after_it(
    new_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, can_end = asyncio.Event(), asyncio.Event()

    async def find_start(feed: Any, since: Any) -> None:
        begun.set()
        await can_end.wait()

    monkeypatch.setattr(endpoint, "find_start", find_start)
    service = new_service()
    async with served_here(service), raw_connection(service, WATCH) as connection:
        await begun.wait()
        text = b'{"id": 7, "action": "ping"}'
        connection.send(b"\x81" + bytes([0x80 + len(text)]) + bytes(4) + text)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await connection.reader.read(1)
        can_end.set()
        assert await connection.head() == "HTTP/1.1 101 Switching Protocols"
        await connection.reader.readuntil(b'"welcome"')
        await connection.reader.readuntil(b'"reply_to":7,"ok":true')


def calls_of(websocket: Any, drained: Callable[[], Awaitable[Any]], written: list[bytes]) -> RestCalls:
    class Waiting:
        def buffered(self) -> int:
            return 0

    writer: Any = Waiting()
    writer.drained = drained
    return RestCalls(websocket, writer, written.append, Room(writer), Shares(MAX_REQUESTS_IN_FLIGHT))


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
    calls = calls_of(websocket, can_write.wait, written)
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
    written: list[bytes] = []
    calls = calls_of(websocket, lambda: asyncio.sleep(0), written)
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
