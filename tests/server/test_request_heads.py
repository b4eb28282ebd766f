"""The limits on the size and time of request heads and handshakes, and the responses to clients that exceed them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

from server.http_heads import HEAD_SECONDS, MAX_HEAD_BYTES, MAX_HEADERS
from tests.support.backends import SQLITE_ONLY
from tests.support.metrics import metric
from tests.support.raw_http import HANDSHAKE, Answer, raw_connection
from tests.support.service import Service, eventually

pytestmark = SQLITE_ONLY

LATE_SECONDS = 3.0  # the tolerated delay on a busy machine
KEY = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
GET = "GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
JSON = "Host: 127.0.0.1\r\nContent-Type: application/json\r\n"


async def test_connections_that_say_nothing_or_never_finish_a_head_are_closed(service: Service) -> None:
    async def silent() -> Answer:
        async with raw_connection(service) as connection:
            return await connection.answer()

    async def trickling(text: str, pause: float = 0.5) -> Answer:
        async with raw_connection(service, text) as connection:

            async def trickle() -> None:
                while True:
                    await asyncio.sleep(pause)
                    connection.send("x")

            trickling = asyncio.create_task(trickle())
            try:
                return await connection.answer()
            finally:
                trickling.cancel()

    async def blank_lines() -> Answer:
        """Send blank lines, which the parser skips before a request.

        If the keep-alive timeout applied here, each line would restart it.
        """
        async with raw_connection(service, GET) as connection:

            async def send() -> None:
                while True:
                    await asyncio.sleep(0.5)
                    connection.send("\r\n")

            sending = asyncio.create_task(send())
            try:
                return await connection.answer()
            finally:
                sending.cancel()

    quiet, *unfinished, blank = await asyncio.gather(
        silent(), trickling("GET /mo"), trickling("GET /movies HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "), blank_lines()
    )
    assert quiet.status == 0, "a browser that connects in advance would take a 408 for the response to its next request"
    assert [each.status for each in unfinished] == [408, 408]
    assert unfinished[0].headers["connection"] == "close"
    assert unfinished[0].detail == "Expected the request line and the headers within 10 seconds"
    assert blank.status == 200
    for each in (quiet, *unfinished, blank):
        assert HEAD_SECONDS - 0.5 < each.seconds < HEAD_SECONDS + LATE_SECONDS


async def test_a_second_request_has_the_time_of_a_head_although_the_first_is_being_answered(service: Service) -> None:
    async with service.person() as alice:
        head = f"POST /movies HTTP/1.1\r\n{JSON}Authorization: Bearer {alice.token}"
        body = '{"title": "The Third Man"}'
        async with raw_connection(
            service, f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}GET /hea"
        ) as connection:
            assert await connection.head() == "HTTP/1.1 201 Created"
            await asyncio.sleep(6.0)  # wait longer than the keep-alive timeout, which must not apply here
            connection.send("lthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            assert b"HTTP/1.1 200 OK" in await connection.reader.read(-1)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (f"GET /healthz?{'q' * MAX_HEAD_BYTES} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 414),
        (f"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Large: {'h' * MAX_HEAD_BYTES}\r\n\r\n", 431),
        (f"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-{'n' * MAX_HEAD_BYTES}: 1\r\n\r\n", 431),
        ("GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n" + "X-Many: 1\r\n" * MAX_HEADERS + "\r\n", 431),
        ("GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n" + f"X-Many: {'h' * 1000}\r\n" * 70 + "\r\n", 431),
        (f"GET /openapi.json?{'q' * 60_000} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n", 422),
        ("GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n" + "X-Many: 1\r\n" * 126 + "\r\n", 200),
        ("GET /health z HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 400),
        (f"{GET}{'x' * 300_000}", 200),
    ],
)
async def test_a_head_has_a_size(service: Service, head: str, status: int) -> None:
    async with raw_connection(service, head) as connection:
        answer = await connection.answer()
    assert answer.status == status
    assert answer.seconds < 2
    if status >= 400:
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["connection"] == "close"
        # The application lists all problems; the server reports only one.
        assert isinstance(answer.detail, list) if status == 422 else answer.detail.startswith("Expected ")


@pytest.mark.parametrize(
    ("begin", "part", "statuses"),
    [
        ("GET /healthz?", "q" * 1024, {414}),
        ("GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Endless: ", "h" * 1024, {431}),
        ("GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n", f"X-Endless: {'h' * 1011}\r\n", {431}),
        ("", "\r\n" * 512, {400}),
        (
            f"POST /movies HTTP/1.1\r\n{JSON}Transfer-Encoding: chunked\r\n\r\n1\r\n{{\r\n0\r\n",
            f"X-Endless: {'h' * 1011}\r\n",
            {400, 401},  # 401 if the request started before the trailer was too long
        ),
    ],
)
async def test_what_never_ends_is_not_kept(service: Service, begin: str, part: str, statuses: set[int]) -> None:
    """An endless target must not be copied for each new part, and endless headers and trailers must not be kept."""
    before = service.memory_bytes()
    async with raw_connection(service, begin) as connection:
        await connection.send_all(part.encode() * 20_000)
        answer = await connection.answer()
    assert answer.status in statuses
    assert service.memory_bytes() - before < 4 * 2**20


async def test_trailers_are_not_headers(service: Service) -> None:
    async with service.person() as alice:
        text = (
            f"POST /movies HTTP/1.1\r\n{JSON}Transfer-Encoding: chunked\r\n"
            'Connection: close\r\n\r\n17\r\n{"title": "Third Man" }\r\n0\r\n'
            f"Authorization: Bearer {alice.token}\r\n\r\n"
        )
        async with raw_connection(service, text) as connection:
            assert (await connection.answer()).status == 401


@pytest.mark.parametrize(
    ("target", "headers", "status"),
    [
        (f"/ws?topics={'m' * 9_000}", "", 414),
        ("/ws", "X-Many: 1\r\n" * 200, 431),
        ("/ws", f"X-Long: {'h' * 9_000}\r\n", 431),
        ("/ws", "Content-Length: 5\r\n", 400),
        ("/ws", "Transfer-Encoding: chunked\r\n", 400),
        ("/ws?topics=planets", "", 422),
    ],
)
async def test_a_handshake_that_is_not_accepted_is_answered(
    service: Service, target: str, headers: str, status: int
) -> None:
    async with raw_connection(service, HANDSHAKE.format(target=target, headers=headers)) as connection:
        answer = await connection.answer()
    assert answer.status == status
    assert answer.seconds < 2
    assert answer.headers["content-type"] == "application/json"
    assert answer.detail


@pytest.mark.parametrize(
    ("valid", "invalid", "expected"),
    [
        ("GET", "POST", "the method GET"),
        (KEY, "", "one header Sec-WebSocket-Key with 16 bytes in base64"),
        (KEY, KEY * 2, "one header Sec-WebSocket-Key with 16 bytes in base64"),
        (KEY, f"Sec-WebSocket-Key: {'k' * 8_000}\r\n", "one header Sec-WebSocket-Key with 16 bytes in base64"),
        ("Version: 13", f"Version: {'9' * 8_000}", "one header Sec-WebSocket-Version with the value 13"),
        (KEY, f'{KEY}Sec-WebSocket-Protocol: "<script>\r\n', "one header Sec-WebSocket-Protocol with a valid value"),
    ],
)
async def test_an_invalid_handshake_is_rejected_like_any_other_request(
    new_service: Callable[..., Service], valid: str, invalid: str, expected: str
) -> None:
    handshake = HANDSHAKE.format(target="/ws", headers="X-Request-ID: the-third-man\r\n").replace(valid, invalid, 1)
    service = new_service().start()

    async def answer_to(text: str) -> Answer:
        async with raw_connection(service, text) as connection:
            answer = await connection.answer()
        assert answer.seconds < 2
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-request-id"] == "the-third-man"
        return answer

    elsewhere = await answer_to(handshake.replace("Host: 127.0.0.1", "Host: evil.example"))
    assert elsewhere.status == 421
    unknown = await answer_to(handshake.replace("/ws", "/planets"))
    assert unknown.status == 404
    answer = await answer_to(handshake)
    assert (answer.status, answer.detail) == (400, f"Expected {expected} in a websocket handshake")
    assert answer.headers["sec-websocket-version"] == "13"

    def logged() -> list[int]:
        lines = [json.loads(line) for line in service.log().splitlines() if line.startswith("{")]
        return [line["status"] for line in lines if line.get("request_id") == "the-third-man" and "status" in line]

    await eventually(lambda: logged() == [421, 404, 400], "each request is logged")


async def test_refused_heads_are_counted(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with raw_connection(service, "nonsense\r\n\r\n") as connection:
        assert (await connection.answer()).status == 400
    assert await metric(service, "marquee_http_connections_refused_total", reason="invalid") == 1

    async def only_this_one() -> bool:
        return await metric(service, "marquee_http_connections") == 1

    await eventually(only_this_one, "closed connections are not counted")
