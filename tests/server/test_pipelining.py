"""Requests that a client sends without waiting for responses (pipelining) are answered in order.

They cost little memory and delay no other client.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable

import pytest

from tests.support.backends import SQLITE_ONLY
from tests.support.raw_http import raw_connection
from tests.support.service import ADMIN, Service

HOST = "Host: 127.0.0.1\r\n"
TINY = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
FLOODS = 4
FLOOD_BYTES = 5_000_000


def numbered(first: int, last: int, line: str = "GET /healthz", headers: str = "", body: str = "") -> str:
    """Return requests that differ only in their ids, from `first` to `last`. The responses repeat the ids."""
    ids = range(first, last + 1)
    return "".join(f"{line} HTTP/1.1\r\n{HOST}X-Request-ID: {id_}\r\n{headers}\r\n{body}" for id_ in ids)


@SQLITE_ONLY
@pytest.mark.parametrize("piece", [2**20, 1500, 50])
async def test_requests_sent_ahead_are_answered_in_order(service: Service, piece: int) -> None:
    json = "Content-Type: application/json\r\n"
    text = (
        numbered(1, 60)
        + numbered(61, 70, "POST /movies", f"{json}Content-Length: 3000\r\n", "x" * 3000)
        + numbered(71, 80, "POST /auth/login", f"{json}Transfer-Encoding: chunked\r\n", "1\r\n{\r\n1\r\n}\r\n0\r\n\r\n")
        + numbered(81, 90, "GET /healthz", "Connection: Upgrade\r\nUpgrade: h2c\r\n")
        + numbered(91, 130)
        + numbered(131, 131, "GET /healthz", "Connection: close\r\n")
        + numbered(132, 200)
    ).encode()
    async with raw_connection(service) as connection:
        for start in range(0, len(text), piece):
            connection.send(text[start : start + piece])
            await asyncio.sleep(0)
        received = (await connection.answer()).body
    assert [int(id_) for id_ in re.findall(rb"(?i)x-request-id: (\d+)\r", received)] == list(range(2, 132))


@SQLITE_ONLY
async def test_a_flood_of_requests_costs_little_memory_and_delays_no_one(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.anyone() as client:

        async def sign_in() -> float:
            started = time.monotonic()
            answer = await client.post("/auth/login", json={"username": ADMIN[0], "password": ADMIN[1]})
            assert answer.status_code == 200
            return time.monotonic() - started

        await sign_in()
        before = service.memory_bytes()

        async def flood() -> None:
            async with raw_connection(service) as connection:
                for _ in range(FLOOD_BYTES // (len(TINY) * 1000)):
                    await connection.send_all(TINY * 1000)
                await connection.answer(600)

        floods = [asyncio.create_task(flood()) for _ in range(FLOODS)]
        try:
            assert await sign_in() < 5
            assert await sign_in() < 5
            assert service.memory_bytes() - before < 30 * 2**20
            assert not any(each.done() for each in floods)
        finally:
            for each in floods:
                each.cancel()
            await asyncio.gather(*floods, return_exceptions=True)
