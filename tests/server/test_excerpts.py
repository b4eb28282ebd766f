"""Responses and the log repeat only excerpts, of bounded size, of what a client sent."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from core.errors import (
    MAX_DETAIL_LENGTH,
    MAX_MEMBERS,
    MAX_PROBLEMS,
    MAX_SUGGESTIONS,
    Conflict,
    FieldProblem,
    InvalidInput,
)
from core.rates import Rate
from core.texts.shortened import MAX_QUOTED_LENGTH, shortened
from core.texts.suggestions import MAX_COMPARED_LENGTH, Unknown
from routes.http import limit_groups, middleware
from routes.http.middleware import MAX_LOGGED_PATH_BYTES
from routes.http.parsing import MAX_PROBLEMS_OF_ROW
from routes.http.rendering import MAX_LINKED_QUERY_BYTES
from services.limits.limiter import Limits
from tests.support.backends import SQLITE_ONLY
from tests.support.requests import over_socket
from tests.support.service import Service, eventually
from tests.support.sockets import refusal

LONG = "n" * 5_000
EXCERPT = "n" * (MAX_QUOTED_LENGTH - 1) + "…"


def test_an_excerpt_ends_with_an_ellipsis() -> None:
    assert shortened("x" * MAX_QUOTED_LENGTH) == "x" * MAX_QUOTED_LENGTH
    assert shortened(LONG) == EXCERPT
    assert shortened("abcdef", 4) == "abc…"
    detail = Conflict(LONG).detail
    assert isinstance(detail, str)
    assert (len(detail), detail[-1]) == (MAX_DETAIL_LENGTH, "…")


def test_only_a_few_unknown_names_get_a_suggestion() -> None:
    names = [f"titl{number}" for number in range(MAX_SUGGESTIONS + 2)]
    problems = [FieldProblem(("body", name), "Unknown", "unknown", Unknown(name, ["title"])) for name in names]
    suggested = ["Unknown. Did you mean title?"] * MAX_SUGGESTIONS
    details = InvalidInput([*problems, problems[0]]).detail
    assert [each["msg"] for each in details] == [*suggested, "Unknown", "Unknown", suggested[0]]  # type: ignore[index]


def test_only_a_similar_name_is_suggested_and_long_names_cost_little() -> None:
    known = ["title", "rating", "release_date"]
    for name, nearest in (("titel", "title"), ("Rating", "rating"), ("rating", None), ("mood", None), ("", None)):
        assert Unknown(name, known).nearest() == nearest, name
    assert Unknown("t" * MAX_COMPARED_LENGTH * 2, ["t" * MAX_COMPARED_LENGTH]).nearest() == "t" * MAX_COMPARED_LENGTH


async def refused_handshake(service: Service, query: str) -> list[dict[str, Any]]:
    status, body = await refusal(service, f"?{query}")
    assert status == 422
    found: list[dict[str, Any]] = body["detail"]
    return found


@SQLITE_ONLY
async def test_a_refused_handshake_repeats_only_excerpts(service: Service) -> None:
    assert [each["loc"] for each in await refused_handshake(service, f"{LONG}=1")] == [["query", EXCERPT]]
    for query in (f"topics={LONG}", f"since={LONG}", f"epoch={LONG}", f"bulk={LONG}"):
        assert all(len(json.dumps(each)) < 500 for each in await refused_handshake(service, query))
    many = await refused_handshake(service, "&".join(f"p{number}=" for number in range(1_000)))
    assert len(many) == MAX_PROBLEMS


@SQLITE_ONLY
async def test_a_rejected_request_repeats_only_excerpts(service: Service) -> None:
    async with service.person() as alice:
        for answer in (
            await alice.http.get(f"/movies?{LONG}=1"),
            await alice.http.get("/movies", params={"filter": json.dumps({LONG: 1})}),
            await alice.http.get(f"/events?{LONG}=1"),
            await alice.http.post("/movies", json={"title": "M", LONG: 1}),
            await alice.http.post("/movies/bulk", json=[{"title": "M", LONG: 1}]),
            await alice.http.post("/auth/register", json={"username": "anna", "password": "x", LONG: 1}),
            await alice.http.post("/users/me/profile", data={LONG: "1"}, files={"avatar": b"x"}),
            await alice.http.post("/auth/password/forgot", json={"email": f"{LONG}@example.org"}),
        ):
            assert answer.status_code == 422, answer.text[:300]
            assert len(answer.content) < 6_000
            assert LONG[: MAX_QUOTED_LENGTH + 1] not in answer.text


@SQLITE_ONLY
async def test_a_socket_repeats_only_excerpts(service: Service) -> None:
    async with service.watch() as watcher:
        for message in (
            {"id": 1, "action": LONG},
            {"id": 1, "action": "subscribe", LONG: 1},
            {"id": 1, "action": "subscribe", "topics": ["movies"], "filter": {LONG: 1}},
            {"id": 1, "action": "subscribe", "topics": [LONG]},
            {"id": 1, "action": "unsubscribe", "subscription": LONG},
            {"id": 1, "action": "request", "method": "GET", "path": "/movies", "headers": {LONG: "1"}},
            {"id": LONG, "action": "ping"},
        ):
            await watcher.send(message)
            reply = await watcher.until(lambda frame: frame.get("ok") is False)
            text = json.dumps(reply, ensure_ascii=False)
            assert len(text) < 4_000, text[:500]
            assert LONG[: MAX_QUOTED_LENGTH + 1] not in text


@SQLITE_ONLY
async def test_the_log_holds_only_excerpts_of_paths_and_origins(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.anyone() as client, service.watch() as watcher:
        assert (await client.get(f"/{LONG * 10}?token=not-logged")).status_code == 404
        assert (await over_socket(watcher, "GET", f"/{LONG}"))["status"] == 404
        asked = {"Origin": f"https://{LONG * 10}", "Access-Control-Request-Method": "POST"}
        refused = await client.options("/movies", headers=asked)
        assert refused.status_code == 403
        assert len(refused.content) < 1_000
        assert "…" in refused.json()["detail"]
    path = shortened(f"/{LONG}", MAX_LOGGED_PATH_BYTES)

    def logged() -> bool:
        lines = [json.loads(line) for line in service.log().splitlines() if line.startswith("{")]
        return [line.get("path") for line in lines].count(path) == 2

    await eventually(logged, "both requests are logged")
    assert all(len(line) < 1_500 for line in service.log().splitlines())


@SQLITE_ONLY
async def test_a_skipped_row_is_reported_with_few_problems(service: Service) -> None:
    async with service.person() as alice:
        rows = [
            {f"unknown{number}": number for number in range(20)},
            {f"unknown{number}": number for number in range(5_000)},
            {"title": "M"},
        ]
        answer = await alice.http.post("/movies/bulk?on_error=skip", json=rows)
        assert answer.status_code == 201, answer.text[:300]
        few, one = (each["detail"] for each in answer.json()["skipped"])
        assert len(few) == MAX_PROBLEMS_OF_ROW
        assert one == [{"loc": ["body", 1], "msg": f"Expected at most {MAX_MEMBERS} members", "type": "too_long"}]
        assert len(answer.json()["added"]) == 1


async def test_a_long_query_is_repeated_only_in_the_link_to_the_next_page(service: Service) -> None:
    async with service.person() as alice:
        for number in range(3):
            await alice.add(title=f"{number}")
        short = f"/movies?user_id={alice.id}&limit=1&offset=1"
        long = f"{short}&title[ne]={'x' * 900}&description[ne]={'x' * 900}&status[ne]={'x' * 900}"
        assert len(long) > MAX_LINKED_QUERY_BYTES
        assert (await alice.http.get(short)).headers["link"].count("rel=") == 4
        link = (await alice.http.get(long)).headers["link"]
        assert link.endswith('rel="next"')
        assert link.count("rel=") == 1
        rest = await alice.http.get(link.partition(">")[0][1:])
        assert [row["title"] for row in rest.json()] == ["2"]


# --- requests that no operation handles


@SQLITE_ONLY
async def test_unknown_paths_and_methods_count_as_reads_of_their_address(new_service: Callable[..., Service]) -> None:
    service = new_service(RATE_LIMITS="on", TRUSTED_PROXIES="127.0.0.1").start()
    async with service.anyone({"X-Forwarded-For": "203.0.113.77"}) as client:
        left = [int((await client.get("/movies")).headers["ratelimit-remaining"])]
        for method, path, status in (
            ("GET", "/nowhere", 404),
            ("POST", "/nowhere/at/all", 404),
            ("PATCH", "/movies", 405),
            ("DELETE", "/healthz", 405),
            ("GET", "/static/nowhere.js", 404),
            ("GET", "/docs/files/nowhere.js", 404),
            ("GET", "/ws", 426),
            ("GET", "/movies", 200),
        ):
            answer = await client.request(method, path)
            assert answer.status_code == status, f"{method} {path}"
            left.append(int(answer.headers["ratelimit-remaining"]))
        assert left == list(range(left[0], left[0] - len(left), -1))
    with pytest.raises(InvalidStatus) as refused:
        async with connect(f"ws://127.0.0.1:{service.port}/nowhere"):
            pass
    assert refused.value.response.status_code == 404
    assert refused.value.response.headers["ratelimit-limit"]


async def test_an_address_that_asks_for_too_many_unknown_paths_is_refused() -> None:
    rule = limit_groups.Rule("read", Rate(2, 60), by_address=True)
    services = SimpleNamespace(limits=Limits(), limit_rules={limit_groups.UNMATCHED: rule})
    inner = Starlette(exception_handlers={HTTPException: middleware.on_http_exception})
    inner.router.default = middleware.not_found

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await inner({**scope, "state": {"services": services}}, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as client:
        answers = [await client.get("/nowhere") for _ in range(3)]
        assert [answer.status_code for answer in answers] == [404, 404, 429]
        assert int(answers[-1].headers["retry-after"]) > 0
