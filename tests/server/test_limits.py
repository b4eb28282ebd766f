"""The limits of a websocket client: connections, messages, and the time to authenticate."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from core.errors import CloseCode
from realtime.sockets.parsing import MAX_BURST_MESSAGES, Bucket
from tests.support.backends import SQLITE_ONLY
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
        await late.sees(movie)  # from the position of the welcome on
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
    """Connect as soon as the limit allows it, which is a moment after another socket was closed."""

    async def attempt() -> ClientConnection | None:
        try:
            return await connect(service.ws_url)
        except InvalidStatus as refused:
            assert refused.response.status_code == 429
            return None

    socket = await eventually(attempt, "there is room")
    yield socket
    await socket.close()
