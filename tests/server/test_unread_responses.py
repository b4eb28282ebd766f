"""A response is aborted if its client does not read it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from realtime.sse.event_stream import Pace
from server import unread_responses
from tests.support.backends import SQLITE_ONLY
from tests.support.raw_http import RawConnection, raw_connection
from tests.support.served_here import served_here
from tests.support.service import Service, eventually


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
