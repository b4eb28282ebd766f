"""A chunked body may have small chunks, but only a limited number of them, because each chunk costs time."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.support.backends import SQLITE_ONLY
from tests.support.metrics import metric
from tests.support.raw_http import raw_connection
from tests.support.service import Service

pytestmark = SQLITE_ONLY

CHUNKED = "Host: 127.0.0.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
REFUSED = "marquee_http_connections_refused_total"
NEXT = "GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"


def chunks(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


async def test_a_body_with_many_small_chunks_is_rejected(service: Service) -> None:
    async with raw_connection(service, f"POST /auth/login HTTP/1.1\r\n{CHUNKED}\r\n") as connection:
        await connection.send_all(chunks(b" ") * 20_000)
        answer = await connection.answer()
    assert answer.status == 400
    assert answer.headers["connection"] == "close"
    assert answer.detail == "Expected chunks of at least 16 bytes on average"


@pytest.mark.parametrize("size", [1, 30])
async def test_a_row_may_be_a_chunk_and_few_chunks_may_be_small(service: Service, size: int) -> None:
    rows = 900 if size > 1 else 5
    text = json.dumps([{"title": f"The Third Man {number}"} for number in range(rows)]).encode()
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    assert len(parts) > 100
    async with service.person() as alice, raw_connection(service) as connection:
        connection.send(f"POST /movies/bulk HTTP/1.1\r\n{CHUNKED}Connection: close\r\n")
        connection.send(f"Authorization: Bearer {alice.token}\r\n\r\n")
        await connection.send_all(chunks(*parts) + b"0\r\n\r\n")
        assert (await connection.answer()).status == 201


@pytest.mark.parametrize(("small", "status"), [(900, b" 200 "), (20_000, b"")])
async def test_the_rest_of_a_rejected_body_is_parsed_up_to_a_number_of_chunks(
    service: Service, small: int, status: bytes
) -> None:
    """The connection can be used again if the rest of the body has few chunks, and is closed if it has many."""
    async with raw_connection(service, f"POST /movies HTTP/1.1\r\n{CHUNKED}\r\n") as connection:
        assert " 401 " in await connection.head()
        await connection.reader.readuntil(b"}")
        await connection.send_all(chunks(b"x" * 100) * small + b"0\r\n\r\n" + NEXT.encode())
        assert status in (await connection.reader.read(-1)).split(b"\r\n")[0]


async def test_small_chunks_are_counted_as_such(new_service: Callable[..., Service]) -> None:
    """The metric tells them from invalid requests, whether the body is rejected or no longer needed."""
    service = new_service().start()
    for target in ("/auth/login", "/movies"):
        async with raw_connection(service, f"POST {target} HTTP/1.1\r\n{CHUNKED}\r\n") as connection:
            if target == "/movies":
                assert " 401 " in await connection.head()
            await connection.send_all(chunks(b" ") * 20_000)
            await connection.reader.read(-1)
    counted = {reason: await metric(service, REFUSED, reason=reason) for reason in ("small_chunks", "invalid")}
    assert counted == {"small_chunks": 2, "invalid": 0}
