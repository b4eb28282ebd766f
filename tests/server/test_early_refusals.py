"""A rejection reaches a client that sends its whole body before reading; a client that never finishes is cut off."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from server import http_budgets
from tests.support.backends import SQLITE_ONLY
from tests.support.raw_http import RawConnection, raw_connection
from tests.support.served_here import served_here
from tests.support.service import Service, eventually

pytestmark = SQLITE_ONLY

TRIES = 20
LENGTH = 3 * 1024 * 1024  # more bytes than the socket buffers hold while the server does not read
JSON = "Host: 127.0.0.1\r\nContent-Type: application/json\r\n"
CLOSE = f"{JSON}Connection: close\r\n"
CHUNK = b"10000\r\n" + b"x" * 65_536 + b"\r\n"


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("POST /movies", 413),
        ("POST /movies", 401),
        ("POST /planets", 404),
        ("POST /movies/1", 405),
        ("GET /movies", 200),
        ("nonsense", 400),
    ],
)
@pytest.mark.parametrize("connection_header", ["close", "keep-alive"])
async def test_a_response_arrives_although_the_client_first_sends_everything(
    service: Service, request_line: str, status: int, connection_header: str
) -> None:
    async with service.person() as alice:
        credentials = f"Authorization: Bearer {alice.token}\r\n" if status == 413 else ""
        head = (
            f"{request_line} HTTP/1.1\r\n{JSON}{credentials}Connection: {connection_header}\r\n"
            f"Content-Length: {LENGTH}\r\n\r\n"
        )
        for _ in range(TRIES):
            async with raw_connection(service, head) as connection:
                await connection.send_all(b"x" * LENGTH)
                assert f" {status} " in await connection.head()


async def test_a_chunked_body_that_is_too_large_is_refused_in_the_same_way(service: Service) -> None:
    async with service.person() as alice:
        head = (
            f"POST /movies HTTP/1.1\r\n{CLOSE}Authorization: Bearer {alice.token}\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(TRIES):
            async with raw_connection(service, head) as connection:
                await connection.send_all(CHUNK * 100 + b"0\r\n\r\n")
                assert (await connection.answer()).status == 413


async def test_a_connection_goes_on_after_a_body_that_was_not_needed(service: Service) -> None:
    async with raw_connection(service) as connection:
        for _ in range(3):
            connection.send(f"POST /movies HTTP/1.1\r\n{JSON}Content-Length: {LENGTH}\r\n\r\n")
            assert " 401 " in await connection.head()
            await connection.reader.readuntil(b"}")
            await connection.send_all(b"x" * LENGTH)
        await asyncio.sleep(6.0)  # wait longer than the keep-alive timeout, which starts after the last body
        assert connection.is_alone()


async def test_what_never_ends_is_cut_off(new_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_budgets, "LINGER_SECONDS", 3.0)
    monkeypatch.setattr(http_budgets, "LINGER_QUIET_SECONDS", 1.0)
    monkeypatch.setattr(http_budgets, "LINGER_BYTES", 2**20)
    head = f"POST /movies HTTP/1.1\r\n{JSON}Content-Length: {2**40}\r\n"
    service = new_service()

    async def send_slowly(connection: RawConnection) -> float:
        """Send a byte every 0.2 s until the server closes the connection; return how many seconds it was open."""
        while not connection.is_alone():
            connection.send(b"x")
            await asyncio.sleep(0.2)
        return time.monotonic() - connection.started

    async def send_fast(connection: RawConnection) -> int:
        size = 0
        while not connection.is_alone():
            await connection.send_all(b"x" * 2**16)
            size += 2**16
        return size

    async with served_here(service) as server:
        for end in ("Connection: close\r\n\r\n", "\r\n"):
            async with (
                raw_connection(service, head + end) as slow,
                raw_connection(service, head + end) as fast,
                raw_connection(service, head + end) as silent,
            ):
                for each in (slow, fast, silent):
                    assert " 401 " in await each.head()
                sending = asyncio.gather(send_fast(fast), send_slowly(slow))
                await eventually(lambda: len(server.server_state.connections) == 1, "two clients are cut off", 2.5)
                await eventually(lambda: not server.server_state.connections, "the slow client is cut off, too", 5)
                sending.cancel()
