"""Responses are compressed when that pays and the client accepts it."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from core import scope_keys
from routes import compression
from routes.compression import MAX_BYTES_ON_LOOP, MIN_BYTES, Compression, accepts_gzip
from tests.support.backends import SQLITE_ONLY
from tests.support.requests import sign_in
from tests.support.service import Service

LONG = "A writer looks for a friend in Vienna. " * 60
GZIP, IDENTITY = {"Accept-Encoding": "gzip"}, {"Accept-Encoding": "identity"}


def is_gzip(response: httpx.Response) -> bool:
    return bool(response.headers.get("content-encoding") == "gzip")


def varies(response: httpx.Response) -> bool:
    return "accept-encoding" in [name.strip().lower() for name in response.headers.get("vary", "").split(",")]


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        ("gzip", True),
        ("GZip;Q=0.5", True),
        ("deflate, gzip;q=1.0, *;q=0.5", True),
        ("br;q=1.0, x-gzip", True),
        ("*", True),
        ("gzip, identity;q=0", True),
        ("gzip;q=0.5, identity;q=0.5", True),
        ("", False),
        ("br, deflate", False),
        ("gzip;q=0", False),
        ("gzip; q=0.000, *", False),
        ("*;q=0", False),
        ("gzip;q=x", False),
        ("gzip;q=0.1, identity;q=0.5", False),
        ("notgzip", False),
    ],
)
def test_accept_encoding_is_parsed(header: str, accepted: bool) -> None:
    assert accepts_gzip(header) is accepted


async def test_json_is_compressed_for_clients_that_accept_it(service: Service) -> None:
    async with service.person(headers=IDENTITY) as alice:
        one = f"/movies/{(await alice.add(description=LONG))['id']}"
        small = f"/movies/{(await alice.add())['id']}"
        plain = await alice.http.get(one)
        packed = await alice.http.get(one, headers=GZIP)
        assert (is_gzip(plain), is_gzip(packed)) == (False, True)
        assert packed.json() == plain.json()
        assert int(packed.headers["content-length"]) < int(plain.headers["content-length"]) / 5
        refused = await alice.http.get(one, headers={"Accept-Encoding": "gzip;q=0, br"})
        tiny = await alice.http.get(small, headers=GZIP)
        assert not is_gzip(refused)
        assert not is_gzip(tiny)
        # A cache must keep the forms of every response apart that may be compressed, errors included.
        error = await alice.http.get("/movies/0", headers=GZIP)
        missing = await alice.http.get("/nothing", headers=GZIP)
        assert all(map(varies, (plain, packed, refused, tiny, error, missing)))


async def test_entity_tags_work_with_and_without_compression(service: Service) -> None:
    async with service.person(headers=IDENTITY) as alice:
        one = f"/movies/{(await alice.add(description=LONG))['id']}"
        strong = (await alice.http.get(one)).headers["etag"]
        weak = (await alice.http.get(one, headers=GZIP)).headers["etag"]
        assert weak == f"W/{strong}"
        for encoding, own in ((GZIP, weak), (IDENTITY, strong)):
            for tag in (strong, weak):
                answer = await alice.http.get(one, headers={"If-None-Match": tag, **encoding})
                assert (answer.status_code, answer.headers["etag"]) == (304, own)
                assert varies(answer)
                assert not answer.content
        guard = {"If-Match": weak, **GZIP}
        changed = await alice.http.patch(one, json={"rating": 60}, headers=guard)
        assert (changed.status_code, is_gzip(changed)) == (200, True)
        assert (await alice.http.patch(one, json={"rating": 70}, headers=guard)).status_code == 412
        latest = {"If-Match": changed.headers["etag"]}
        assert (await alice.http.patch(one, json={"rating": 80}, headers=latest)).status_code == 200


@SQLITE_ONLY
async def test_head_has_the_headers_of_get(service: Service) -> None:
    async with service.person(headers=GZIP) as alice:
        one = f"/movies/{(await alice.add(description=LONG))['id']}"
        for path in (one, "/static/live.js", "/docs/files/swagger.js", "/docs/files/redoc.js", "/"):
            got, headed = await alice.http.get(path), await alice.http.head(path)
            assert headed.status_code == 200
            assert headed.content == b""
            for name in ("content-encoding", "content-type", "etag", "vary"):
                assert headed.headers.get(name) == got.headers.get(name), (path, name)
            # HEAD may omit the length, but must not name another one.
            assert headed.headers.get("content-length", got.headers.get("content-length")) == got.headers.get(
                "content-length"
            )


async def test_a_document_is_compressed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/document":
            scope[scope_keys.DOCUMENT] = "a document"
        await Response(b"x" * 200_000, media_type="text/plain")(scope, receive, send)

    sizes = []
    compress = compression._Response._compress

    def counted(self: Any, body: bytes, more: bool) -> bytes:
        sizes.append(len(body))
        return compress(self, body, more)

    monkeypatch.setattr(compression._Response, "_compress", counted)
    transport = httpx.ASGITransport(Compression(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=GZIP) as client:
        for path, times in (("/document", 1), ("/other", 3)):
            sizes.clear()
            for _ in range(3):
                answer = await client.get(path)
                assert is_gzip(answer)
                assert answer.content == b"x" * 200_000
            assert len(sizes) == times


@SQLITE_ONLY
async def test_pages_documents_and_files_are_compressed(service: Service) -> None:
    async with service.anyone(headers=IDENTITY) as plain, service.anyone(headers=GZIP) as packing:
        for path in ("/", "/openapi.json", "/asyncapi.json", "/metrics", "/static/live.js", "/docs/files/swagger.js",
                     "/docs/files/redoc.js"):  # fmt: skip
            known, packed = await plain.get(path), await packing.get(path)
            assert (is_gzip(known), is_gzip(packed)) == (False, True), path
            assert varies(known), path
            assert varies(packed), path
            if path != "/metrics":
                assert packed.content == known.content, path
        script = await packing.get("/static/live.js")
        for tag in (script.headers["etag"], script.headers["etag"].removeprefix("W/")):
            answer = await packing.get("/static/live.js", headers={"If-None-Match": tag})
            assert (answer.status_code, answer.headers["etag"], varies(answer)) == (304, script.headers["etag"], True)


@SQLITE_ONLY
async def test_an_error_never_takes_the_place_of_a_document(new_service: Callable[..., Service]) -> None:
    """The first request for a document decides what is kept, so it must not be one that fails."""
    with new_service().running() as service:
        async with service.anyone(headers=GZIP) as client:
            queries = "&".join(f"unknown{number}=1" for number in range(50))
            for _ in range(2):
                refused = await client.get(f"/openapi.json?{queries}")
                assert (refused.status_code, is_gzip(refused)) == (422, True)
                assert len(refused.json()["detail"]) == 50
                document = await client.get("/openapi.json")
                assert is_gzip(document)
                assert document.json()["openapi"] == "3.1.0"


async def test_streams_and_replies_on_a_socket_are_not_compressed(service: Service) -> None:
    async with service.person(headers=GZIP) as alice, service.watch() as watcher:
        movie = await alice.add(description=LONG)
        async with alice.http.stream("GET", "/events", headers={"Accept": "text/event-stream"}) as stream:
            assert stream.status_code == 200
            assert "content-encoding" not in stream.headers
        message = {"action": "request", "id": 7, "method": "GET", "path": f"/movies/{movie['id']}", "headers": GZIP}
        await watcher.send(message)
        reply = await watcher.until(lambda frame: frame.get("reply_to") == 7)
        assert reply["body"] == movie
        assert "content-encoding" not in reply["headers"]


@SQLITE_ONLY
async def test_responses_with_tokens_are_never_compressed(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async with service.person(headers=GZIP) as alice:
        tokens = await sign_in(alice.http, alice.name)
        answers = [tokens]
        refresh = tokens.json()["refresh_token"]
        answers.append(await alice.http.post("/auth/refresh", json={"refresh_token": refresh}))
        answers.append(await alice.http.post("/token", data={"username": "x" * 50, "password": "y"}))
        for answer in answers:
            assert "content-encoding" not in answer.headers
            assert not varies(answer)


async def test_compression_can_be_turned_off(new_service: Callable[..., Service]) -> None:
    with new_service(COMPRESSION="off").running() as service:
        async with service.anyone(headers=GZIP) as client:
            answer = await client.get("/openapi.json")
            assert "content-encoding" not in answer.headers
            assert not varies(answer)


# --- the middleware alone


@asynccontextmanager
async def served(response: Response) -> AsyncIterator[httpx.AsyncClient]:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await response(scope, receive, send)

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(Compression(app)), base_url="http://test", headers=GZIP
    ) as client:
        yield client


@pytest.mark.parametrize(
    ("response", "is_packed"),
    [
        (Response(b"x" * (MIN_BYTES - 1), media_type="application/json"), False),
        (Response(b"x" * MIN_BYTES, media_type="application/json"), True),
        (Response(b"x" * MIN_BYTES, 422, media_type="application/problem+json"), True),
        (Response(b"x" * MIN_BYTES, media_type="text/html"), True),
        (Response(b"x" * MIN_BYTES, media_type="image/webp"), False),
        (Response(b"x" * MIN_BYTES, media_type="application/octet-stream"), False),
        (Response(b"x" * MIN_BYTES), False),
        (Response(b"x" * (MAX_BYTES_ON_LOOP + 1), media_type="application/json"), True),
        (Response(gzip.compress(b"x" * 9999), media_type="text/css", headers={"Content-Encoding": "gzip"}), True),
        (Response(zlib.compress(b"x" * 9999), media_type="text/css", headers={"Content-Encoding": "deflate"}), False),
    ],
)
async def test_type_size_and_encoding_decide(response: Response, is_packed: bool) -> None:
    async with served(response) as client:
        answer = await client.get("/")
        assert is_gzip(answer) is is_packed
        assert set(answer.content) == {ord("x")}
        assert answer.status_code == response.status_code


async def test_a_response_in_parts_is_sent_in_parts() -> None:
    """The client can read each part before the next one is made."""
    sent: list[bytes] = []
    made = 0

    async def parts() -> AsyncIterator[bytes]:
        nonlocal made
        for part in (b"a" * 2_000, b"b" * 100_000, b"c"):
            assert zlib.decompressobj(31).decompress(b"".join(sent)) == b"a" * min(made, 1) * 2_000 + b"b" * (
                100_000 if made > 1 else 0
            )
            made += 1
            yield part

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    async def receive() -> Any:
        await asyncio.Event().wait()

    response = StreamingResponse(parts(), media_type="text/css")
    scope = {
        "type": "http",
        "method": "GET",
        "headers": [(b"accept-encoding", b"gzip")],
        "asgi": {"spec_version": "2.4"},
    }
    await Compression(response)(scope, receive, send)
    assert gzip.decompress(b"".join(sent)) == b"a" * 2_000 + b"b" * 100_000 + b"c"


async def test_a_large_response_does_not_delay_others(monkeypatch: pytest.MonkeyPatch) -> None:
    on_loop: list[bool] = []
    compress = compression._Response._compress

    def noting(self: Any, body: bytes, more: bool) -> bytes:
        try:
            asyncio.get_running_loop()
            on_loop.append(True)
        except RuntimeError:
            on_loop.append(False)
        return compress(self, body, more)

    monkeypatch.setattr(compression._Response, "_compress", noting)
    for size, expected in ((MAX_BYTES_ON_LOOP, True), (MAX_BYTES_ON_LOOP + 1, False)):
        async with served(Response(b"x" * size, media_type="application/json")) as client:
            assert len((await client.get("/")).content) == size
        assert on_loop.pop() is expected
