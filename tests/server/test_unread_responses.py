"""A response is aborted if its client does not read it, or if too many bytes wait for its address."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from core.network import unsent
from core.network.unsent import UnsentBytes
from realtime.sse.event_stream import Pace
from realtime.wire.room import Room
from server import unread_responses
from tests.support.backends import SQLITE_ONLY
from tests.support.metrics import metric
from tests.support.raw_http import HANDSHAKE, RawConnection, raw_connection
from tests.support.requests import ok
from tests.support.served_here import served_here
from tests.support.service import Service, Watcher, eventually


@SQLITE_ONLY
async def test_a_response_that_is_not_read_is_given_up_and_one_that_is_read_slowly_is_not(
    new_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unread_responses, "WRITE_SECONDS", 1.5)
    monkeypatch.setattr(unread_responses, "WRITE_CHECK_SECONDS", 0.2)
    service = new_service()
    async with served_here(service) as server, service.person() as alice:
        await alice.add_bulk([{"title": str(n), "description": "d" * 5_000} for n in range(200)])
        await alice.add_bulk([{"title": str(n), "description": "d" * 5_000} for n in range(200)])
        page = "GET /movies?limit=400 HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        many, last = f"{page}\r\n" * 10, f"{page}Connection: close\r\n\r\n"
        async with (
            raw_connection(service, many, keeps=2**14) as deaf,
            raw_connection(service, many + last, keeps=2**14) as closing,
            raw_connection(service, many + last, keeps=2**16) as slow,
            raw_connection(service, many + last, keeps=2**16) as half_closed,
        ):
            half_closed.writer.write_eof()
            begun = time.monotonic()
            clients = {each.writer.get_extra_info("sockname") for each in (deaf, closing)}
            for each in (deaf, closing):
                transport: Any = each.writer.transport
                transport.pause_reading()

            def are_gone() -> bool:
                connections: set[Any] = set(server.server_state.connections)
                return clients.isdisjoint(connection.client for connection in connections)

            async def read_slowly(connection: RawConnection) -> int:
                size = 0
                while data := await connection.reader.read(2**16):
                    size += len(data)
                    if time.monotonic() - begun < 4:
                        await asyncio.sleep(0.5)
                return size

            reading = asyncio.gather(read_slowly(slow), read_slowly(half_closed))
            await eventually(are_gone, "the connections are aborted", 15)
            assert 1.4 < time.monotonic() - begun < 8
            assert min(await reading) > 11 * 400 * 5_000, "a slow reader gets everything"


def test_an_event_stream_ends_its_slow_client_before_the_connection_does() -> None:
    assert Pace().write_seconds < unread_responses.WRITE_SECONDS


# --- all connections of an address

FAT_ROWS = 104  # a page of them has about 4 MiB, which is the most that a page may have
STRANGER = "127.0.0.2"


async def add_fat_rows(service: Service) -> None:
    async with service.person() as alice:
        rows = [{"title": str(number), "description": "\N{CLAPPER BOARD}" * 10_000} for number in range(FAT_ROWS)]
        await alice.add_bulk(rows)


@SQLITE_ONLY
async def test_the_unread_responses_of_one_address_take_little_memory(new_service: Callable[..., Service]) -> None:
    service = new_service(RATE_LIMITS="on").start()
    await add_fat_rows(service)
    page = f"/movies?limit={FAT_ROWS}"
    pages = f"GET {page} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 3

    async def dropped() -> float:
        return await metric(service, "marquee_http_connections_refused_total", reason="unread")

    async with service.anyone() as client, AsyncExitStack() as stack:
        assert len(await ok(client.get(page))) == FAT_ROWS
        before = service.memory_bytes()
        connections = [
            await stack.enter_async_context(raw_connection(service, pages, address=STRANGER, keeps=2**14))
            for _ in range(60)
        ]
        for connection in connections:
            transport: Any = connection.writer.transport
            transport.pause_reading()
        await eventually(lambda: _at_least(dropped, 10), "connections are dropped", 30)
        assert len(await ok(client.get(page))) == FAT_ROWS, "other addresses are not affected"
        assert 0 < await metric(service, "marquee_http_unsent_bytes") <= unsent.MAX_CLIENT_BYTES
        assert service.memory_bytes() - before < 2 * unsent.MAX_CLIENT_BYTES
    assert '"event": "unread response dropped"' in service.log()


async def _at_least(number: Callable[[], Any], wanted: float) -> bool:
    return bool(await number() >= wanted)


@SQLITE_ONLY
async def test_the_unread_replies_to_one_address_take_little_memory(new_service: Callable[..., Service]) -> None:
    service = new_service(RATE_LIMITS="on").start()
    await add_fat_rows(service)
    request = {"id": 1, "action": "request", "method": "GET", "path": "/movies?limit=18"}  # a reply of about 720 kB
    text = json.dumps(request).encode()
    message = b"\x81" + bytes([0x80 + len(text)]) + bytes(4) + text
    async with service.watch() as watcher, service.watch(local_addr=(STRANGER, 0)) as neighbour:
        assert (await replied(watcher, request))["status"] == 200
        before = service.memory_bytes()
        async with AsyncExitStack() as stack:
            for _ in range(50):
                handshake = HANDSHAKE.format(target="/ws", headers="")
                deaf = raw_connection(service, handshake, address=STRANGER, keeps=2**14)
                connection = await stack.enter_async_context(deaf)
                await connection.head()
                transport: Any = connection.writer.transport
                transport.pause_reading()
                connection.send(message * 16)

            async def is_refused() -> bool:
                error = (await replied(neighbour, request)).get("error", {})
                return bool(error.get("code") == "too_many_requests")

            await eventually(is_refused, "too many bytes wait for the address", 60)
            assert (await replied(watcher, request))["status"] == 200, "other addresses are not affected"
            assert await metric(service, "marquee_websocket_unsent_bytes") < 1.5 * unsent.MAX_CLIENT_BYTES
            # The replies that are being made come on top: without a bound, 800 of them would take 576 MB.
            assert service.memory_bytes() - before < 3 * unsent.MAX_CLIENT_BYTES

        async def is_answered() -> bool:
            return (await replied(neighbour, request)).get("status") == 200

        await eventually(is_answered, "the others are gone")


async def replied(watcher: Watcher, message: dict[str, Any]) -> dict[str, Any]:
    await watcher.send(message)
    return await watcher.until(lambda frame: frame.get("reply_to") == message["id"])


class Waiting:
    def __init__(self, size: int) -> None:
        self.size = size

    def buffered(self) -> int:
        return self.size

    async def drained(self) -> None:
        pass


def test_unsent_bytes_are_limited_per_client_and_in_total(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsent, "MAX_CLIENT_BYTES", 100)
    monkeypatch.setattr(unsent, "MAX_BYTES", 250)
    monkeypatch.setattr(unsent, "GUARANTEED_BYTES", 10)
    monkeypatch.setattr(unsent, "RECOUNT_SECONDS", 0.0)
    counted: UnsentBytes[Waiting] = UnsentBytes()

    def added(client: str, size: int) -> Waiting:
        counted.count(client, waiting := Waiting(size))
        return waiting

    first, second = added("a", 60), added("a", 60)
    assert counted.is_full("a")
    assert set(counted.excess("a")) == {first, second}
    assert not counted.is_full("b")
    assert not counted.excess("b")
    second.size = 30
    assert not counted.is_full("a"), "what the client has taken is no longer counted"
    assert counted.total == 90
    added("b", 90)
    small, proxy = added("c", 10), added("", 100)
    assert counted.total == 290
    assert [counted.is_full(client) for client in ("a", "b", "c", "")] == [True, True, False, False]
    assert set(counted.excess("c")) == {proxy}, "the client with the most bytes is affected"
    counted.forget("", proxy)
    counted.forget("", proxy)
    assert not counted.excess("c")
    assert not counted.is_full("a")
    small.size = 0
    assert counted.total == 190


async def test_a_socket_has_room_when_the_other_sockets_of_its_client_have_little_unread_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unsent, "MAX_CLIENT_BYTES", 100)
    monkeypatch.setattr(unsent, "RECOUNT_SECONDS", 0.0)
    counted: UnsentBytes[Any] = UnsentBytes()
    writers: list[Any] = [Waiting(60), Waiting(10), Waiting(10)]
    deaf, neighbour, other = (Room(writer, counted, name) for writer, name in zip(writers, "aab", strict=True))
    deaf.wrote(95)
    assert not deaf.is_full()
    assert neighbour.is_full()
    assert not other.is_full()
    writers[0].size = 0
    assert not neighbour.is_full()
    neighbour.hold(held := Waiting(200))
    assert deaf.is_full()
    neighbour.close(held)
    neighbour.hold(held)
    assert not deaf.is_full()
