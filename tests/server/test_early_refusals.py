"""A rejection reaches a client that sends its whole body before reading; a client that never finishes is cut off."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from server import http_budgets
from tests.support.backends import SQLITE_ONLY
from tests.support.metrics import metric
from tests.support.raw_http import HANDSHAKE, RawConnection, raw_connection
from tests.support.served_here import served_here
from tests.support.service import Service, eventually

pytestmark = SQLITE_ONLY

TRIES = 20
LENGTH = 3 * 1024 * 1024  # more bytes than the socket buffers hold while the server does not read
JSON = "Host: 127.0.0.1\r\nContent-Type: application/json\r\n"
CLOSE = f"{JSON}Connection: close\r\n"
UPGRADE = HANDSHAKE.partition("\r\n")[2].format(headers="").removesuffix("\r\n")
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


@pytest.mark.parametrize(
    ("request_line", "headers", "status"),
    [
        ("GET /ws", f"Content-Length: {LENGTH}\r\n", 400),
        ("POST /ws", f"Content-Length: {LENGTH}\r\n", 400),
        ("POST /movies", "Transfer-Encoding: chunked\r\n", 400),
        ("GET /ws", "Authorization: Bearer x\r\n", 401),
        ("GET /ws?topics=audit", "", 403),
        ("GET /planets", "", 404),
        ("POST /ws", "", 400),
        ("GET /ws", "Sec-WebSocket-Key: x\r\n", 400),
        (f"GET /ws?{'q' * 9_000}", "", 414),
        ("GET /ws?topics=planets", "", 422),
    ],
)
async def test_the_response_to_a_handshake_arrives_in_the_same_way(
    service: Service, request_line: str, headers: str, status: int
) -> None:
    handshake = HANDSHAKE.format(target="/ws", headers=headers).replace("GET /ws", request_line, 1)
    for _ in range(TRIES):
        async with raw_connection(service, handshake) as connection:
            await connection.send_all(b"x" * LENGTH)
            assert f" {status} " in await connection.head()


async def test_a_rejected_handshake_counts_as_a_connection_until_it_is_closed(
    new_service: Callable[..., Service],
) -> None:
    service = new_service().start()

    async def connections(number: int) -> bool:
        return await metric(service, "marquee_http_connections") == 1 + number  # one of them asks for the metric

    async with raw_connection(service, HANDSHAKE.format(target="/planets", headers="")) as connection:
        assert (await connection.answer()).status == 404
        assert await connections(1)
    await eventually(lambda: connections(0), "the closed connection is no longer counted")


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


@pytest.mark.parametrize(("headers", "status"), [(CLOSE, 401), (JSON, 401), (UPGRADE, 400)])
async def test_what_never_ends_is_cut_off(
    new_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, headers: str, status: int
) -> None:
    monkeypatch.setattr(http_budgets, "LINGER_SECONDS", 3.0)
    monkeypatch.setattr(http_budgets, "LINGER_QUIET_SECONDS", 1.0)
    monkeypatch.setattr(http_budgets, "LINGER_BYTES", 2**20)
    head = f"POST /movies HTTP/1.1\r\n{headers}Content-Length: {2**40}\r\n\r\n"
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
        async with (
            raw_connection(service, head) as slow,
            raw_connection(service, head) as fast,
            raw_connection(service, head) as silent,
        ):
            for each in (slow, fast, silent):
                assert f" {status} " in await each.head()
            sending = asyncio.gather(send_fast(fast), send_slowly(slow))
            await eventually(lambda: len(server.server_state.connections) == 1, "two clients are cut off", 2.5)
            await eventually(lambda: not server.server_state.connections, "the slow client is cut off, too", 5)
            sending.cancel()
