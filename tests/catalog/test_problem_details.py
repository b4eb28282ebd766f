"""Errors are problem details (RFC 9457) for clients that prefer them, and `{"detail": …}` for all others."""

from __future__ import annotations

from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from core.error_bodies import JSON, MAX_ACCEPT_LENGTH, PROBLEM_JSON, encoded, weights_of
from core.settings import Settings
from main import build_app
from schemas import MAX_BODY_BYTES
from tests.support.backends import SQLITE_ONLY
from tests.support.requests import ok
from tests.support.service import Service
from tests.support.sockets import request, signed_in

PREFERS = {"Accept": PROBLEM_JSON}


def assert_same_problem(plain: httpx.Response, details: httpx.Response, status: int) -> None:
    """Assert that two responses report the same error, one as plain JSON, the other as problem details."""
    assert (plain.status_code, details.status_code) == (status, status), plain.text[:300]
    assert (plain.headers["content-type"], details.headers["content-type"]) == (JSON, PROBLEM_JSON)
    varying = {"content-length", "content-type", "date", "x-request-id"}
    assert {k: v for k, v in plain.headers.items() if k not in varying} == {
        k: v for k, v in details.headers.items() if k not in varying
    }
    assert "Accept" in plain.headers["vary"].split(", ")
    assert plain.json().keys() == {"detail"}
    detail, found = plain.json()["detail"], details.json()
    about = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
    if isinstance(detail, str):
        assert found == {**about, "detail": detail}
    else:
        assert found == {**about, "detail": found["detail"], "errors": detail}
        assert found["detail"].startswith(f"{'.'.join(map(str, detail[0]['loc']))}: {detail[0]['msg']}")


FOREIGN = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "GET"}
REJECTED: list[tuple[str, str, dict[str, Any], int]] = [
    ("GET", "/auth/me", {"headers": {"Authorization": "Bearer x"}}, 401),
    ("GET", "/users/nonAdmin", {}, 403),
    ("PATCH", "/users/me", {"json": {"username": "another"}}, 403),
    ("OPTIONS", "/movies", {"headers": FOREIGN}, 403),
    ("GET", "/nowhere", {}, 404),
    ("GET", "/static/nowhere.js", {}, 404),
    ("DELETE", "/movies/999999999", {}, 404),
    ("PUT", "/movies", {}, 405),
    ("POST", "/characters", {"json": {"name": "Harry", "movie_id": 999999999}}, 409),
    ("POST", "/movies", {"content": b" " * (MAX_BODY_BYTES + 1)}, 413),
    ("POST", "/movies", {"content": b"x", "headers": {"Content-Type": "text/plain"}}, 415),
    ("GET", "/movies", {"headers": {"Host": "elsewhere.example"}}, 421),
    ("GET", "/movies?limit=x", {}, 422),
    ("POST", "/movies/bulk?oops=1", {"json": [{"titel": "M"}]}, 422),
    ("GET", "/ws", {}, 426),
]


@pytest.mark.parametrize(
    ("method", "path", "options", "status"), REJECTED, ids=[f"{each[3]} {each[0]} {each[1]}" for each in REJECTED]
)
@SQLITE_ONLY
async def test_an_error_has_the_form_that_the_client_prefers(
    service: Service, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    async with service.person() as alice:
        plain = await alice.http.request(method, path, **options)
        headers = options.get("headers", {}) | PREFERS
        assert_same_problem(plain, await alice.http.request(method, path, **{**options, "headers": headers}), status)


@SQLITE_ONLY
async def test_a_successful_response_does_not_depend_on_the_preference(service: Service) -> None:
    async with service.anyone() as client:
        answer = await client.get("/movies?limit=1", headers=PREFERS)
        assert (answer.status_code, answer.headers["content-type"]) == (200, JSON)
        assert "Accept" not in answer.headers["vary"].split(", ")


@SQLITE_ONLY
async def test_sockets_and_their_handshakes_honour_the_preference(service: Service) -> None:
    async with service.person() as alice, service.watch(**signed_in(alice)) as watcher:
        reply = await request(watcher, "GET", "/movies?limit=x", headers=PREFERS)
        assert (reply["headers"]["content-type"], reply["body"]["status"]) == (PROBLEM_JSON, 422)
        for path, status in (("/ws?topics=x", 422), ("/nowhere", 404)):
            with pytest.raises(InvalidStatus) as refused:
                async with connect(service.ws_url.removesuffix("/ws") + path, additional_headers=PREFERS):
                    pass
            response = refused.value.response
            details = httpx.Response(response.status_code, headers=list(response.headers.raw_items()))
            assert (details.status_code, details.headers["content-type"]) == (status, PROBLEM_JSON)
            assert "Accept" in details.headers["vary"].split(", ")
        assert (await ok(alice.http.get("/movies?limit=0"))) == []


async def test_pages_of_other_origins_get_both_names_in_vary(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/marquee.db"
    settings = Settings(database_url=url, allowed_origins=("https://app.example",), _env_file=None)
    transport = httpx.ASGITransport(app=build_app(settings))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as page:
        origin = {"Origin": "https://app.example"}
        answer = await page.get("/nowhere", headers=origin | PREFERS)
        assert answer.headers["content-type"] == PROBLEM_JSON
        assert set(answer.headers["vary"].split(", ")) == {"Accept", "Accept-Encoding", "Origin"}
        asked = origin | {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "x-strange"}
        plain = await page.options("/movies", headers=asked)
        assert plain.json() == {"detail": "Disallowed CORS headers"}
        assert_same_problem(plain, await page.options("/movies", headers=asked | PREFERS), 400)
        assert "Origin" in plain.headers["vary"].split(", ")
        assert plain.headers["access-control-allow-origin"] == "https://app.example"


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (PROBLEM_JSON, PROBLEM_JSON),
        (f"application/json, {PROBLEM_JSON}", PROBLEM_JSON),
        ("text/html, Application/Problem+JSON;q=0.4, */*;q=0.1", PROBLEM_JSON),
        (f"{PROBLEM_JSON};q=0.9, application/json", JSON),
        (f"{PROBLEM_JSON};q=0", JSON),
        ("application/problem+xml, application/problem+jsonx", JSON),
        ("*/*", JSON),
        ("", JSON),
    ],
)
def test_the_media_type_must_be_named_with_at_least_the_weight_of_json(accept: str, expected: str) -> None:
    assert encoded(404, "Not Found", accept)[1] == expected


def test_the_end_of_a_long_header_is_ignored() -> None:
    filler = "a/b, " * (MAX_ACCEPT_LENGTH // 5 - 1)
    assert weights_of(f"{filler}c/d;q=0.5, e/f") == {"a/b": 1.0}  # a weight is never cut off
    assert weights_of(f"{filler}c/d") == {"a/b": 1.0, "c/d": 1.0}
    assert len(weights_of(",".join(map(str, range(10_000))))) < MAX_ACCEPT_LENGTH / 2
