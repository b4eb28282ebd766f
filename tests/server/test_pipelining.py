"""Requests that a client sends without waiting for responses (pipelining) are answered in order.

They cost little memory and delay no other client.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable

import pytest

from tests.support.backends import SQLITE_ONLY
from tests.support.raw_http import HANDSHAKE, raw_connection
from tests.support.service import ADMIN, Service, eventually

HOST = "Host: 127.0.0.1\r\n"
TINY = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
LOGIN = json.dumps({"username": ADMIN[0], "password": ADMIN[1]})  # checking a password takes a moment
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
    assert ids(received) == list(range(2, 132))


@SQLITE_ONLY
@pytest.mark.parametrize("framing", ["Content-Length: {length}\r\n", "Transfer-Encoding: chunked\r\n"])
async def test_the_body_of_a_request_with_an_upgrade_is_not_parsed_as_a_request(service: Service, framing: str) -> None:
    """The parser expects no body after a request for an upgrade, even if the upgrade is ignored."""
    hidden = numbered(2, 2)
    upgrade = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n" + framing.format(length=len(hidden))
    async with raw_connection(service, numbered(1, 1, "POST /auth/login", upgrade, hidden)) as connection:
        answer = await connection.answer()
    assert answer.status == 400
    assert answer.detail == "Expected no Upgrade header in a request with a body; only HTTP/1.1 is available"


def slow(first: int, last: int, headers: str = "") -> str:
    """Return requests whose responses take so long that all other input arrives in the meantime."""
    about = f"Content-Type: application/json\r\nContent-Length: {len(LOGIN)}\r\n{headers}"
    return numbered(first, last, "POST /auth/login", about, LOGIN)


def ids(received: bytes) -> list[int]:
    return [int(id_) for id_ in re.findall(rb"(?i)x-request-id: (\d+)\r", received)]


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1.1 (\d+) ", received)]


@SQLITE_ONLY
@pytest.mark.parametrize(
    "rest",
    [
        "",
        "GET /hea",
        numbered(41, 41, "POST /movies", "Content-Length: 10\r\n", "{"),
        HANDSHAKE.format(target="/ws", headers=""),
        slow(41, 41).replace("Content-Length: ", "Content-Length: 1"),
    ],
)
async def test_all_complete_requests_are_answered_after_the_client_has_ended_its_side(
    service: Service, rest: str
) -> None:
    async with raw_connection(service, slow(1, 3) + numbered(4, 37) + slow(38, 40) + rest) as connection:
        connection.writer.write_eof()
        async with asyncio.timeout(10):
            received = await connection.reader.read(-1)
    assert ids(received) == list(range(1, 41))
    assert statuses(received) == [200] * 40


@SQLITE_ONLY
async def test_a_response_without_an_end_stops_after_the_client_has_ended_its_side(service: Service) -> None:
    """A client that has left must not occupy the place of an event stream."""
    stream = f"GET /events HTTP/1.1\r\n{HOST}Accept: text/event-stream\r\n\r\n"
    async with raw_connection(service, stream) as connection:
        assert await connection.head() == "HTTP/1.1 200 OK"
        connection.writer.write_eof()
        async with asyncio.timeout(10):
            await connection.reader.read(-1)


@SQLITE_ONLY
@pytest.mark.parametrize("gap", ["", "\r\n" * 600])
async def test_a_handshake_waits_for_the_response_to_the_previous_request(service: Service, gap: str) -> None:
    """It does not matter whether the handshake is parsed in one piece with the previous request."""
    async with raw_connection(service, slow(1, 2) + gap + HANDSHAKE.format(target="/ws", headers="")) as connection:
        async with asyncio.timeout(10):
            assert statuses(await connection.reader.readuntil(b'"welcome"')) == [200, 200, 101]


@SQLITE_ONLY
@pytest.mark.parametrize(
    ("invalid", "detail"),
    [
        ("nonsense\r\n\r\n", "Expected a valid HTTP/1.1 request"),
        (slow(3, 3, "Content-Length: 5\r\n"), "Expected a valid HTTP/1.1 request"),
        (
            numbered(3, 3, "POST /auth/login", "Transfer-Encoding: chunked\r\n", "1\r\n{\r\nnonsense\r\n"),
            "Expected a valid HTTP/1.1 request",
        ),
    ],
)
@pytest.mark.parametrize("gap", ["", "\r\n" * 600])
async def test_an_invalid_request_is_rejected_after_the_response_to_the_previous_request(
    service: Service, invalid: str, detail: str, gap: str
) -> None:
    async with raw_connection(service, slow(1, 2) + gap + invalid + "x" * 10_000) as connection:
        received = await connection.reader.read(-1)
    assert statuses(received) == [200, 200, 400]
    assert ids(received) == [1, 2]
    assert json.loads(received.rpartition(b"\r\n\r\n")[2]) == {"detail": detail}
    assert time.monotonic() - connection.started < 5, "the rejection waited for a deadline"


@SQLITE_ONLY
async def test_the_log_lines_of_a_request_do_not_carry_the_id_of_the_previous_one(
    new_service: Callable[..., Service],
) -> None:
    service = new_service().start()
    async with raw_connection(service, slow(1, 1) + "\r\n" * 600 + "nonsense\r\n\r\n") as connection:
        assert statuses(await connection.reader.read(-1)) == [200, 400]

    def rejected() -> list[dict[str, object]]:
        lines = [json.loads(line) for line in service.log().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == "request rejected"]

    (line,) = await eventually(rejected, "the rejection is logged")
    assert "request_id" not in line


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
