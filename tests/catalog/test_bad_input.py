"""Input that is wrong in every way: each a clear error, nothing half written, and the service goes on."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.support.backends import SQLITE_ONLY
from tests.support.resources import BOTH, CHARACTERS, MOVIES, ResourceCase, locations, nothing_written, sql
from tests.support.service import PASSWORD, Person, Service, eventually

HUGE = 20 * 1024 * 1024
JSON = {"Content-Type": "application/json"}


def assert_problem(answer: httpx.Response, status: int, *wanted: list[Any]) -> None:
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["content-type"] == "application/json"
    if wanted:
        assert sorted(map(str, locations(answer))) == sorted(map(str, wanted))


# --- bodies


@BOTH
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b'{"title": "x", "name": "x"',
        b"\xff\xfe",
        b'{"title": "\xff", "name": "\xff"}',
        b"NaN",
        b'{"title": NaN}',
        b"[" * 100_000,
        b'{"title":' * 5_000,
        b'{"title": "\\ud800", "name": "\\ud800"}',
        b'{"title": "x" "name": "x"}',
        b"title=x&name=x",
        b"{'title': 'x'}",
    ],
    ids=lambda raw: repr(raw[:16]),
)
@SQLITE_ONLY
async def test_what_is_not_json_is_refused_as_such(service: Service, kind: ResourceCase, raw: bytes) -> None:
    async with service.person() as alice, nothing_written(service):
        for method, path in (("POST", kind.path), ("POST", f"{kind.path}/bulk"), ("PATCH", f"{kind.path}/1")):
            answer = await alice.http.request(method, path, content=raw, headers=JSON)
            assert_problem(answer, 422, ["body"])


@BOTH
@pytest.mark.parametrize("value", [None, [], "text", 1, 1.5, True, [{}]], ids=repr)
@SQLITE_ONLY
async def test_a_body_of_another_kind_is_refused(service: Service, kind: ResourceCase, value: Any) -> None:
    async with service.person() as alice, nothing_written(service):
        for method, path in (
            ("POST", kind.path),
            ("POST", f"/users/{alice.id}{kind.path}"),
            ("PUT", f"{kind.path}/1"),
            ("PATCH", f"{kind.path}/1"),
            ("DELETE", f"{kind.path}/bulk"),
        ):
            assert_problem(await alice.http.request(method, path, content=json.dumps(value), headers=JSON), 422)


MOVIE_FAULTS: list[tuple[str, Any]] = [
    ("title", ""),
    ("title", " \t\n"),
    ("title", None),
    ("title", 5),
    ("title", ["x"]),
    ("title", "x" * 256),
    ("title", "nul \0 inside"),
    ("description", "x" * 10_001),
    ("description", "\0"),
    ("description", {}),
    ("release_date", "1949-02-30"),
    ("release_date", "01.09.1949"),
    ("release_date", "1949-09-01T00:00:00Z"),
    ("release_date", "0000-01-01"),
    ("release_date", 0),
    ("rating", 0),
    ("rating", 101),
    ("rating", "93"),
    ("rating", 93.5),
    ("rating", True),
    ("rating", 10**30),
    ("duration_minutes", 0),
    ("duration_minutes", 2**31),
    ("budget", -1),
    ("budget", 2**53),
    ("budget", 2**64),
    ("revenue", -(10**40)),
    ("status", ""),
    ("status", "x" * 51),
    ("country", "gb"),
    ("country", "GBR"),
    ("genres", "Noir"),
    ("genres", None),
    ("genres", ["Noir", "Noir"]),
    ("genres", [str(n) for n in range(21)]),
    ("languages", {"a": 1}),
    ("user_id", 1),
    ("id", 1),
    ("version", 1),
    ("characters_count", 7),
    ("created_at", "2000-01-01T00:00:00Z"),
    ("titel", "x"),
    ("", "x"),
]
CHARACTER_FAULTS: list[tuple[str, Any]] = [
    ("name", ""),
    ("name", "\u2003"),
    ("name", None),
    ("name", {"first": "Harry"}),
    ("name", "x" * 256),
    ("name", "\0"),
    ("description", "x" * 10_001),
    ("description", 1),
    ("movie_id", 0),
    ("movie_id", -1),
    ("movie_id", "1"),
    ("movie_id", 1.5),
    ("movie_id", True),
    ("movie_id", 2**63),
    ("movie_id", 10**300),
    ("user_id", 1),
    ("movie", 1),
]


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [(MOVIES, *fault) for fault in MOVIE_FAULTS] + [(CHARACTERS, *fault) for fault in CHARACTER_FAULTS],
    ids=lambda each: each.name if isinstance(each, ResourceCase) else repr(each)[:24],
)
@SQLITE_ONLY
async def test_a_wrong_field_is_named(service: Service, kind: ResourceCase, field: str, value: Any) -> None:
    async with service.person() as alice:
        mine = await alice.add(kind.name)
        good = kind.fields("good")
        async with nothing_written(service):
            one = f"{kind.path}/{mine['id']}"
            for method, path in (("POST", kind.path), ("PUT", one), ("PATCH", one)):
                answer = await alice.http.request(method, path, content=json.dumps(good | {field: value}), headers=JSON)
                assert_problem(answer, 422, ["body", field])
            answer = await alice.http.post(
                f"{kind.path}/bulk", content=json.dumps([good, good | {field: value}]), headers=JSON
            )
            assert_problem(answer, 422, ["body", 1, field])
            if field != "id":
                changes = [{"id": mine["id"], kind.label: "new"}, {"id": mine["id"], field: value}]
                answer = await alice.http.patch(f"{kind.path}/bulk", content=json.dumps(changes), headers=JSON)
                assert_problem(answer, 422, ["body", 1, field])


@SQLITE_ONLY
async def test_every_problem_of_a_request_is_said_at_once(service: Service) -> None:
    async with service.person() as alice, nothing_written(service):
        answer = await alice.http.post("/movies?x=1", json={"rating": 0, "country": "xx", "oops": 1})
        assert_problem(
            answer, 422, ["query", "x"], ["body", "title"], ["body", "rating"], ["body", "country"], ["body", "oops"]
        )


async def test_an_unknown_movie_of_a_character_is_a_conflict(service: Service) -> None:
    async with service.person() as alice:
        harry = await alice.add("characters")
        async with nothing_written(service):
            for unknown in (2**63 - 1, 10**9):
                body = {"name": "Harry", "movie_id": unknown}
                assert_problem(await alice.http.post("/characters", json=body), 409, ["body", "movie_id"])
                one = f"/characters/{harry['id']}"
                assert_problem(await alice.http.put(one, json=body), 409, ["body", "movie_id"])
                assert_problem(await alice.http.patch(one, json={"movie_id": unknown}), 409, ["body", "movie_id"])
                answer = await alice.http.post("/characters/bulk", json=[{"name": "Anna"}, body])
                assert_problem(answer, 409, ["body", 1, "movie_id"])
                answer = await alice.http.patch("/characters/bulk", json=[{"id": harry["id"], "movie_id": unknown}])
                assert_problem(answer, 409, ["body", 0, "movie_id"])


# --- sizes


@BOTH
@SQLITE_ONLY
async def test_a_body_of_20_mb_is_too_large(service: Service, kind: ResourceCase) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(HUGE // 65_536):
            yield b"x" * 65_536

    async with service.person() as alice, nothing_written(service):
        for path in (kind.path, f"{kind.path}/bulk"):
            assert_problem(await alice.http.post(path, content=b"x" * HUGE, headers=JSON), 413)
            assert_problem(await alice.http.post(path, content=chunks(), headers=JSON), 413)
        async with service.anyone() as anonymous:
            assert_problem(await anonymous.post("/auth/register", content=b"x" * HUGE, headers=JSON), 413)
            assert_problem(await anonymous.post(kind.path, content=b"x" * HUGE, headers=JSON), 401)


@BOTH
@SQLITE_ONLY
async def test_10_001_rows_are_refused(service: Service, kind: ResourceCase) -> None:
    rows = [kind.fields("x")] * 10_001
    async with service.person() as alice, nothing_written(service):
        assert_problem(await alice.http.post(f"{kind.path}/bulk", json=rows), 422, ["body"])
        assert_problem(await alice.http.post(f"{kind.path}/bulk?on_error=skip", json=rows), 422, ["body"])
        changes = [{"id": 1, kind.label: "x"}] * 10_001
        assert_problem(await alice.http.patch(f"{kind.path}/bulk", json=changes), 422, ["body"])
        ids = list(range(1, 10_002))
        answer = await alice.http.request("DELETE", f"{kind.path}/bulk", json={"ids": ids})
        assert_problem(answer, 422, ["body", "ids"])
        assert_problem(await alice.http.delete(f"{kind.path}/bulk/1/10001"), 409, ["path", "end_id"])


@BOTH
@pytest.mark.parametrize("body", [{}, {"ids": []}, {"ids": ["1"]}, {"ids": [0]}, {"ids": [1], "x": 1}, {"ids": None}])
@SQLITE_ONLY
async def test_wrong_ids_are_refused(service: Service, kind: ResourceCase, body: Any) -> None:
    async with service.person() as alice, nothing_written(service):
        assert_problem(await alice.http.request("DELETE", f"{kind.path}/bulk", json=body), 422)


@BOTH
@pytest.mark.parametrize("content_type", [None, "text/plain", "application/xml", "application/jsonx", "text/json"])
@SQLITE_ONLY
async def test_another_media_type_is_refused(service: Service, kind: ResourceCase, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    async with service.person() as alice, nothing_written(service):
        raw = json.dumps(kind.fields("x")).encode()
        for method, path in (("POST", kind.path), ("PUT", f"{kind.path}/1"), ("DELETE", f"{kind.path}/bulk")):
            assert_problem(await alice.http.request(method, path, content=raw, headers=headers), 415)


@BOTH
async def test_a_charset_does_not_make_json_another_type(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        headers = {"Content-Type": "Application/JSON; charset=utf-8"}
        raw = json.dumps(kind.fields("Anna Schmidt")).encode()
        assert (await alice.http.post(kind.path, content=raw, headers=headers)).status_code == 201


# --- paths and queries


@BOTH
@pytest.mark.parametrize("wrong", ["0", "-1", "x", "1.5", str(2**63), "9" * 400, "1%00", "%FF", "١x"])
@SQLITE_ONLY
async def test_an_id_that_is_none_is_refused(service: Service, kind: ResourceCase, wrong: str) -> None:
    async with service.person() as alice, nothing_written(service):
        one = f"{kind.path}/{wrong}"
        assert_problem(await alice.http.get(one), 422, ["path", "id"])
        assert_problem(await alice.http.put(one, json=kind.fields("x")), 422, ["path", "id"])
        assert_problem(await alice.http.patch(one, json={}), 422, ["path", "id"])
        assert_problem(await alice.http.delete(one), 422, ["path", "id"])
        assert_problem(await alice.http.get(f"/users/{wrong}{kind.path}"), 422, ["path", "user_id"])
        assert_problem(await alice.http.delete(f"{kind.path}/bulk/{wrong}/5"), 422, ["path", "start_id"])


@BOTH
@pytest.mark.parametrize("unknown", [10**9, 2**31, 2**63 - 1])
async def test_an_id_that_nobody_has_is_not_found(service: Service, kind: ResourceCase, unknown: int) -> None:
    async with service.person() as alice, nothing_written(service):
        one = f"{kind.path}/{unknown}"
        for answer in (
            await alice.http.get(one),
            await alice.http.put(one, json=kind.fields("x")),
            await alice.http.patch(one, json=kind.fields("x")),
            await alice.http.delete(one),
            await alice.http.get(f"/users/{unknown}{kind.path}"),
        ):
            assert_problem(answer, 404)
            assert str(unknown) in answer.json()["detail"]
        answer = await alice.http.patch(f"{kind.path}/bulk", json=[{"id": unknown, kind.label: "x"}])
        assert answer.json() == {"updated": [], "not_found": [unknown]}
        answer = await alice.http.request("DELETE", f"{kind.path}/bulk", json={"ids": [unknown]})
        assert answer.json() == {"deleted": [], "not_found": [unknown]}


@BOTH
@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=-1", "limit"),
        ("limit=1001", "limit"),
        ("limit=x", "limit"),
        ("limit=" + "9" * 5000, "limit"),
        ("limit=", "limit"),
        ("offset=-1", "offset"),
        ("skip=-5", "skip"),
        (f"offset={2**63}", "offset"),
        ("after=-1", "after"),
        ("sort=password", "sort"),
        ("sort=id,id", "sort"),
        ("sort=id,", "sort"),
        ("sort=--id", "sort"),
        ("sort=id%00", "sort"),
        ("q=%00", "q"),
        ("q=" + "x" * 201, "q"),
        ("titel=x", "titel"),
        ("user_id[like]=1", "user_id[like]"),
        ("user_id=x", "user_id"),
        ("user_id[gte]=1.5", "user_id[gte]"),
        ("user_id=" + "9" * 30, "user_id"),
        ("user_id[in]=1,x", "user_id[in]"),
        ("user_id[in]=" + ",".join(["1"] * 101), "user_id[in]"),
        ("user_id[contains]=1", "user_id[contains]"),
        ("created_at=yesterday", "created_at"),
        ("created_at[gte]=2020-13-01T00:00:00Z", "created_at[gte]"),
        ("description=%00", "description"),
        ("description=" + "x" * 1001, "description"),
        ("limit=1&limit=2", "limit"),
        ("user_id[]=1", "user_id[]"),
    ],
    ids=lambda text: text[:24],
)
@SQLITE_ONLY
async def test_a_wrong_query_is_named(service: Service, kind: ResourceCase, query: str, field: str) -> None:
    async with service.person() as alice, nothing_written(service):
        for path in (kind.path, f"{kind.path}/names", f"{kind.path}/user", f"/users/{alice.id}{kind.path}"):
            assert_problem(await alice.http.get(f"{path}?{query}"), 422, ["query", field])


@BOTH
@SQLITE_ONLY
async def test_a_query_that_is_no_text_is_refused(service: Service, kind: ResourceCase) -> None:
    async with service.anyone() as anonymous, nothing_written(service):
        for query in ("q=%ff", "q=%ed%a0%80", "&".join(f"x{n}=1" for n in range(301))):
            assert_problem(await anonymous.get(f"{kind.path}?{query}"), 422, ["query"])
        many = "&".join("user_id=1" for _ in range(201))
        assert_problem(await anonymous.get(f"{kind.path}?{many}"), 422, ["query"])


@BOTH
async def test_numbers_past_the_column_match_nothing(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        await alice.add(kind.name)
        columns = ["id", "user_id", "version"]
        columns += ["rating", "duration_minutes", "budget", "characters_count"] if kind is MOVIES else ["movie_id"]
        for column in columns:
            for number in (40_000, 2**31, 2**63 - 1, -(2**31) - 1, 1 - 2**63):
                for op in ("eq", "in"):
                    answer = await alice.http.get(f"{kind.path}/count?{column}[{op}]={number}&user_id={alice.id}")
                    assert answer.json() == {"count": 0}, (column, op, number)
                query = f"{column}[lt]={number}&{column}[gte]={-number}&user_id={alice.id}"
                assert (await alice.http.get(f"{kind.path}?{query}")).status_code == 200, (column, number)


@BOTH
async def test_signs_that_patterns_use_are_only_signs(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        for label in ("100% wool", "under_score", "back\\slash", 'quote\'s "double"', "semi;colon -- drop"):
            await alice.add(kind.name, **{kind.label: label})
        for text, wanted in (("%", 1), ("_", 1), ("\\", 1), ("'", 1), ('"', 1), ("--", 1), ("/", 0), ("%%", 0)):
            for query in (f"{kind.label}[contains]={quote(text)}", f"q={quote(text)}"):
                answer = await alice.http.get(f"{kind.path}/user?{query}")
                assert len(answer.json()) == wanted, (query, answer.text)


# --- headers


@BOTH
async def test_an_entity_tag_of_absurd_length_matches_nothing(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        one = f"{kind.path}/{(await alice.add(kind.name))['id']}"
        async with nothing_written(service):
            for tag in ('"' + "9" * 5000 + '-0123456789abcdef"', '"', ",,,", '""', "\u00e9"):
                headers = {b"If-Match": tag.encode("latin-1")}
                assert_problem(await alice.http.request("DELETE", one, headers=headers), 412)


def unsigned(person: Person, header: dict[str, Any] | None = None) -> str:
    def part(value: Any) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part(header or {'alg': 'none', 'typ': 'JWT'})}.{person.token.split('.')[1]}."


def nested() -> str:
    deep = base64.urlsafe_b64encode(b"[" * 30_000).decode().rstrip("=")
    return f"{deep}.{deep}.x"


# Each is good but for what it is named for.
BAD_TOKENS: dict[str, Callable[[Person], str]] = {
    "garbage": lambda _: "garbage",
    "dots": lambda _: "..",
    "two parts": lambda _: "a.b",
    "not ascii": lambda _: "é.é.é",
    "deeply nested": lambda _: nested(),
    "alg none": unsigned,
    "alg None": lambda person: unsigned(person, {"alg": "None"}),
    "alg missing": lambda person: unsigned(person, {"typ": "JWT"}),
    "another key": lambda person: person.forged(key="another key that is long enough too"),
    "an empty key": lambda person: person.forged(key=" "),
    "another algorithm": lambda person: person.forged(algorithm="HS512"),
    "another audience": lambda person: person.forged(aud="others"),
    "no audience": lambda person: person.forged(aud=None),
    "another issuer": lambda person: person.forged(iss="others"),
    "no issuer": lambda person: person.forged(iss=None),
    "expired": lambda person: person.forged(exp=int(time.time()) - 60),
    "no expiry": lambda person: person.forged(exp=None),
    "no subject": lambda person: person.forged(sub=None),
    "a subject that is no number": lambda person: person.forged(sub="chief"),
    "a subject past every id": lambda person: person.forged(sub=str(10**30)),
    "an unknown user": lambda person: person.forged(sub=str(10**12)),
    "another user": lambda person: person.forged(sub="1"),
    "no session": lambda person: person.forged(sid=None),
    "a session that is no text": lambda person: person.forged(sid=1),
    "a session that is no id": lambda person: person.forged(sid="a\0b"),
    "an unknown session": lambda person: person.forged(sid=str(uuid.uuid4())),
    "crit": lambda person: person.forged(headers={"crit": ["exp"]}),
    "a refresh token": lambda person: person.forged(typ="refresh"),
    "no type": lambda person: person.forged(typ=None),
    "not yet": lambda person: person.forged(nbf=int(time.time()) + 600),
    "no jti": lambda person: person.forged(jti=None),
}


@pytest.mark.parametrize("made", BAD_TOKENS.values(), ids=list(BAD_TOKENS))
async def test_a_bad_token_is_refused_everywhere(service: Service, made: Callable[[Person], str]) -> None:
    # Also where no token is needed: whoever sends one believes to be somebody.
    async with service.person() as alice, service.anyone() as client, nothing_written(service):
        headers = {b"Authorization": f"Bearer {made(alice)}".encode()}
        for method, path in (("GET", "/auth/me"), ("POST", "/movies"), ("DELETE", "/characters/1"), ("GET", "/movies")):
            answer = await client.request(method, path, headers=headers)
            assert_problem(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"


async def test_a_good_forgery_would_be_taken(service: Service) -> None:
    """Else the tokens above may be refused for another reason than the one they are named for."""
    async with service.person() as alice, service.anyone() as client:
        headers = {"Authorization": f"Bearer {alice.forged(jti='0123')}"}
        assert (await client.get("/auth/me", headers=headers)).json()["id"] == alice.id


@pytest.mark.parametrize("header", ["Basic Y2hpZWY6eA==", "Bearer", "Token x", "bearer\tx"])
@SQLITE_ONLY
async def test_another_scheme_is_refused(service: Service, header: str) -> None:
    async with service.anyone() as client:
        assert_problem(await client.get("/movies", headers={"Authorization": header}), 401)


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        (["UPDATE users SET is_active = false WHERE id = {}"], 403),
        # In no other words than a wrong password.
        (["DELETE FROM sessions WHERE user_id = {}", "DELETE FROM users WHERE id = {}"], 401),
    ],
    ids=["disabled", "deleted"],
)
async def test_the_token_of_a_user_who_is_gone_is_refused(service: Service, changes: list[str], refusal: int) -> None:
    async with service.person() as alice:
        assert (await alice.http.get("/auth/me")).status_code == 200
        for change in changes:
            await sql(service, change.format(alice.id))
        for method, path in (("GET", "/auth/me"), ("POST", "/movies"), ("GET", "/characters")):
            assert_problem(await alice.http.request(method, path, json={"title": "x"}), 401)
        answer = await sign_in(alice.http, alice.name)
        assert_problem(answer, refusal)


# --- the inside stays inside


def is_logged(service: Service, request_id: str) -> bool:
    """The line of a request is written once its response has been sent."""
    return request_id in service.log()


async def test_a_500_says_nothing_of_the_inside(new_service: Any) -> None:
    with new_service().running() as service:
        async with service.person() as alice:
            # No group of this name exists: the code meets what it does not expect.
            await sql(service, f"UPDATE users SET \"group\" = 'nonsense' WHERE id = {alice.id}")
            for method, path in (("GET", "/movies"), ("POST", "/movies")):
                answer = await alice.http.request(method, path, json={"title": "x"})
                assert answer.status_code == 500, answer.text
                assert answer.json() == {"detail": "Internal Server Error"}
                request_id = answer.headers["x-request-id"]
                await eventually(partial(is_logged, service, request_id), "the log has its number")
        async with service.person() as bob:
            await bob.add()


async def test_what_is_no_http_does_no_harm(service: Service) -> None:
    async with nothing_written(service):
        for raw in (b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"POST /movies HTTP/1.1\r\nContent-Length: x\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
            writer.write(raw)
            async with asyncio.timeout(10):
                assert (await reader.read(12)) in (b"HTTP/1.1 400", b"")
            writer.close()
            await writer.wait_closed()


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error(service: Service) -> None:
    async with service.person() as alice:
        for head in ("Content-Length: 100", "Transfer-Encoding: chunked"):
            _, writer = await asyncio.open_connection("127.0.0.1", service.port)
            writer.write(
                f"POST /movies HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {alice.token}\r\n"
                f"Content-Type: application/json\r\nX-Request-ID: left-{head[0]}\r\n{head}\r\n\r\n".encode()
            )
            await writer.drain()
            writer.close()
            await writer.wait_closed()

            def told(request_id: str = f"left-{head[0]}") -> list[str]:
                return [line for line in service.log().splitlines() if request_id in line]

            await eventually(told, "the log tells of it", 10)
            assert not any('"error"' in line for line in told())


async def test_a_file_of_the_documentation_that_is_not_there_is_an_error_like_any_other(service: Service) -> None:
    async with service.anyone() as anonymous:
        answer = await anonymous.get("/docs/files/%00")
        assert answer.status_code == 404
        assert list(answer.json()) == ["detail"]
