"""What a client can have of the websocket: connections, messages, and time to say who it is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from core.errors import CloseCode
from realtime.sockets.parsing import MAX_BURST_MESSAGES, Bucket
from tests.support.backends import SQLITE_ONLY
from tests.support.service import Service, eventually
from tests.support.sockets import closing, refusal


@SQLITE_ONLY
async def test_connections_from_one_address_have_an_end(new_service: Callable[..., Service]) -> None:
    service = new_service(MAX_CONNECTIONS_PER_ADDRESS="3", RATE_LIMITS="on").start()
    async with AsyncExitStack() as stack:
        watchers = [await stack.enter_async_context(service.watch()) for _ in range(3)]
        status, body = await refusal(service)
        assert (status, body["detail"]) == (429, "Too many connections from 127.0.0.1")
        await watchers[0].socket.close()
        async with connect_when_there_is_room(service):
            assert (await refusal(service))[0] == 429


@SQLITE_ONLY
async def test_connections_have_an_end(new_service: Callable[..., Service]) -> None:
    service = new_service(MAX_CONNECTIONS="2").start()
    async with service.watch(), service.watch():
        status, body = await refusal(service)
        assert (status, body["detail"]) == (503, "Too many connections")


@SQLITE_ONLY
async def test_limits_of_number_can_be_lifted(new_service: Callable[..., Service]) -> None:
    service = new_service(MAX_CONNECTIONS_PER_ADDRESS="1", RATE_LIMITS="off").start()
    async with service.watch(), service.watch() as watcher:
        for number in range(MAX_BURST_MESSAGES * 2):
            await watcher.send({"id": number, "action": "ping"})
        for number in range(MAX_BURST_MESSAGES * 2):
            assert (await watcher.next())["reply_to"] == number


@SQLITE_ONLY
async def test_too_many_messages_are_refused_and_then_the_socket_is_closed(new_service: Callable[..., Service]) -> None:
    async with new_service(RATE_LIMITS="on").start().watch() as watcher:
        replies = []

        async def read() -> int:
            try:
                while True:
                    frame = json.loads(await watcher.socket.recv())
                    if "reply_to" in frame:
                        replies.append(frame)
            except ConnectionClosed as closed:
                assert closed.rcvd is not None
                return closed.rcvd.code

        async def flood() -> None:
            try:
                for number in range(20_000):
                    await watcher.send({"id": number, "action": "ping"})
            except ConnectionClosed:
                pass

        code, _ = await asyncio.gather(read(), flood())
        assert code == CloseCode.TOO_MANY_MESSAGES
        good = [reply for reply in replies if reply["ok"]]
        refused = [reply for reply in replies if not reply["ok"]]
        assert len(good) >= MAX_BURST_MESSAGES
        assert {reply["error"]["code"] for reply in refused} == {"rate_limited"}


def test_a_bucket_fills_again() -> None:
    bucket = Bucket(0.0)
    assert all(bucket.take(0.0) for _ in range(MAX_BURST_MESSAGES))
    assert not bucket.take(0.0)
    assert not bucket.take(0.001)
    assert bucket.take(0.0025)
    assert not bucket.take(0.0026)
    assert bucket.refused == 3, "one that is let through now and then is no sign of listening"
    assert sum(bucket.take(1_000.0) for _ in range(2 * MAX_BURST_MESSAGES)) == MAX_BURST_MESSAGES


@SQLITE_ONLY
async def test_where_everybody_must_sign_in(new_service: Callable[..., Service]) -> None:
    service = new_service(WEBSOCKET_AUTH="required").start()
    async with service.person() as alice, service.watch() as late, service.watch() as never:
        movie = await alice.add()
        reply = await late.ask({"id": 1, "action": "subscribe"})
        assert reply["error"]["code"] == "unauthenticated"
        assert (await late.ask({"id": 2, "action": "auth", "token": alice.token}))["ok"]
        assert (await late.expect("add"))["data"] == movie, "from the welcome on"
        headers = {"Authorization": f"Bearer {alice.token}"}
        async with service.watch(additional_headers=headers) as direct:
            assert direct.welcome["data"]["user_id"] == alice.id
            movie = await alice.add()
            assert (await direct.expect("add"))["data"] == movie
        assert (await closing(never))[0] == CloseCode.TOKEN_EXPIRED
        assert never.events == []


@SQLITE_ONLY
async def test_a_place_is_given_back_however_a_socket_ends(new_service: Callable[..., Service]) -> None:
    service = new_service(MAX_CONNECTIONS_PER_ADDRESS="2", RATE_LIMITS="on").start()
    for number in range(6):
        async with connect_when_there_is_room(service) as socket:
            if number % 2:
                await socket.close()
            else:
                socket.transport.abort()
    assert (await refusal(service, "?topics=planets"))[0] == 422
    async with connect_when_there_is_room(service), connect_when_there_is_room(service):
        assert (await refusal(service))[0] == 429


@asynccontextmanager
async def connect_when_there_is_room(service: Service) -> AsyncIterator[ClientConnection]:
    """A place is free again a moment after its socket was closed."""

    async def attempt() -> ClientConnection | None:
        try:
            return await connect(service.ws_url)
        except InvalidStatus as refused:
            assert refused.response.status_code == 429
            return None

    socket = await eventually(attempt, "there is room")
    yield socket
    await socket.close()
