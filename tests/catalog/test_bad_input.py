"""Invalid input of every kind: a clear error, no partial write, and the service stays up."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any
from urllib.parse import quote

import pytest

from core.errors import MAX_SUGGESTIONS
from tests.support.backends import SQLITE_ONLY
from tests.support.requests import assert_problem, sign_in, values_by_field
from tests.support.resources import BOTH, CHARACTERS, MOVIES, ResourceCase, locations, nothing_written, sql
from tests.support.service import Person, Service, eventually
from tests.support.sockets import refusal

HUGE = 20 * 1024 * 1024
JSON = {"Content-Type": "application/json"}
BULK = "{}/bulk"


# --- bodies


BROKEN_JSON = [
    *(b"", b"{", b'{"title": "x", "name": "x"', b"\xff\xfe", b'{"title": "\xff", "name": "\xff"}', b"NaN"),
    *(b'{"title": NaN}', b"[" * 100_000, b'{"title":' * 5_000, b'{"title": "\\ud800", "name": "\\ud800"}'),
    *(b'{"title": "x" "name": "x"}', b"title=x&name=x", b"{'title': 'x'}"),
]


@BOTH
@pytest.mark.parametrize("raw", BROKEN_JSON, ids=lambda raw: repr(raw[:16]))
@SQLITE_ONLY
async def test_broken_json_is_rejected(service: Service, kind: ResourceCase, raw: bytes) -> None:
    async with service.person() as alice, nothing_written(service):
        for method, path in (("POST", kind.path), ("POST", f"{kind.path}/bulk"), ("PATCH", f"{kind.path}/1")):
            assert_problem(await alice.http.request(method, path, content=raw, headers=JSON), 422, ["body"])


@BOTH
@SQLITE_ONLY
async def test_a_body_that_is_no_object_is_rejected(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice, nothing_written(service):
        one, own = f"{kind.path}/1", f"/users/{alice.id}{kind.path}"
        values: list[Any] = [None, [], "text", 1, 1.5, True, [{}]]
        for method, path in (("POST", kind.path), ("POST", own), ("PUT", one), ("PATCH", one), ("DELETE", BULK)):
            for value in values:
                raw = json.dumps(value)
                assert_problem(await alice.http.request(method, path.format(kind.path), content=raw, headers=JSON), 422)


MOVIE_FAULTS: dict[str, list[Any]] = {
    "title": ["", " \t\n", None, 5, ["x"], "x" * 256, "nul \0 inside"],
    "description": ["x" * 10_001, "\0", {}],
    "release_date": ["1949-02-30", "01.09.1949", "1949-09-01T00:00:00Z", "0000-01-01", 0],
    "rating": [0, 101, "93", 93.5, True, 10**30],
    "duration_minutes": [0, 2**31],
    "budget": [-1, 2**53, 2**64],
    "revenue": [-(10**40)],
    "status": ["", "x" * 51],
    "country": ["gb", "GBR"],
    "languages": [{"a": 1}],
    "genres": ["Noir", None, [str(n) for n in range(21)]],
    "actors": [{"name": "Alida Valli"}, list(range(1, 22))],
    "user_id": [1],
    "id": [1],
    "version": ["1", True],
    "characters_count": [7],
    "comments_count": [7],
    "created_at": ["2000-01-01T00:00:00Z"],
    "titel": ["x"],
    "": ["x"],
}
CHARACTER_FAULTS: dict[str, list[Any]] = {
    "name": ["", "\u2003", None, {"first": "Harry"}, "x" * 256, "\0"],
    "description": ["x" * 10_001, 1],
    "movie_id": [0, -1, "1", 1.5, True, 2**63, 10**300],
    "user_id": [1],
    "movie": [1],
}
FAULTS = [
    (kind, *fault)
    for kind, faults in ((MOVIES, MOVIE_FAULTS), (CHARACTERS, CHARACTER_FAULTS))
    for fault in values_by_field(faults)
]


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    FAULTS,
    ids=lambda each: each.name if isinstance(each, ResourceCase) else repr(each)[:24],
)
@SQLITE_ONLY
async def test_an_invalid_field_is_named(service: Service, kind: ResourceCase, field: str, value: Any) -> None:
    async with service.person() as alice:
        mine = await alice.add(kind.name)
        good = kind.fields("good")
        one, bulk, bad = f"{kind.path}/{mine['id']}", f"{kind.path}/bulk", good | {field: value}
        changes = [{"id": mine["id"], kind.label: "new"}, {"id": mine["id"], field: value}]
        requests: list[tuple[str, str, Any]] = [("POST", kind.path, bad), ("PUT", one, bad), ("PATCH", one, bad)]
        requests += [("POST", bulk, [good, bad]), *([("PATCH", bulk, changes)] if field != "id" else [])]
        async with nothing_written(service):
            for method, path, body in requests:
                answer = await alice.http.request(method, path, content=json.dumps(body), headers=JSON)
                assert_problem(answer, 422, ["body", *([1] if path == bulk else []), field])


@SQLITE_ONLY
async def test_every_problem_of_a_request_is_reported_at_once(service: Service) -> None:
    async with service.person() as alice, nothing_written(service):
        answer = await alice.http.post("/movies?x=1", json={"rating": 0, "country": "xx", "oops": 1})
        fields = ("title", "rating", "country", "oops")
        assert_problem(answer, 422, ["query", "x"], *(["body", field] for field in fields))


@BOTH
@SQLITE_ONLY
async def test_no_problem_of_a_request_hides_another(service: Service, kind: ResourceCase) -> None:
    label = kind.label
    async with service.person() as alice, nothing_written(service):
        answer = await alice.http.get(
            f"{kind.path}?limit=x&offset=-1&sort=oops&after=y&id[like]=1&{label}[in]=%22a&q=%00"
        )
        places = ("limit", "offset", "sort", "after", "id[like]", f"{label}[in]", "q")
        assert sorted(map(tuple, locations(answer))) == sorted(("query", place) for place in places)
        assert answer.status_code == 422
        rows = [{label: ""}, {label: "good"}, {"oops": 1}]
        answer = await alice.http.post(f"{kind.path}/bulk?on_error=x&y=1", json=rows)
        assert_problem(
            answer,
            422,
            ["query", "on_error"],
            ["query", "y"],
            ["body", 0, label],
            ["body", 2, label],
            ["body", 2, "oops"],
        )
        answer = await alice.http.request("PATCH", f"{kind.path}/x?y=1", json={label: "", "oops": 1})
        assert_problem(answer, 422, ["path", "id"], ["query", "y"], ["body", label], ["body", "oops"])
        answer = await alice.http.delete(f"{kind.path}/bulk/9/8?y=1")
        assert_problem(answer, 422, ["path", "end_id"], ["query", "y"])


@SQLITE_ONLY
async def test_an_invalid_member_does_not_hide_a_missing_one(service: Service) -> None:
    async with service.anyone() as client, nothing_written(service):
        answer = await client.post("/auth/register?x=1", json={"first_name": "", "phone_number": "x"})
        told = [(problem["loc"], problem["msg"]) for problem in answer.json()["detail"]]
        assert [loc for loc, _ in told] == [
            ["query", "x"], ["body", "first_name"], ["body", "phone_number"], ["body"], ["body"],
        ]  # fmt: skip
        assert [message for _, message in told[-2:]] == ["Expected username, email or both", "Expected password"]
        answer = await client.post("/auth/login", json={"oops": 1})
        assert_problem(answer, 422, ["body", "oops"], ["body"], ["body"])
        answer = await client.post("/users", json={})
        assert answer.json()["detail"][0]["msg"] == "Expected username, email or both"


async def test_an_unknown_movie_of_a_character_is_a_conflict(service: Service) -> None:
    async with service.person() as alice:
        harry, anna = await alice.add("characters"), await alice.add("characters", movie_id=(await alice.add())["id"])
        async with nothing_written(service):
            for unknown in (2**63 - 1, 10**9):
                body = {"name": "Harry", "movie_id": unknown}
                assert_problem(await alice.http.post("/characters", json=body), 409, ["body", "movie_id"])
                one = f"/characters/{harry['id']}"
                assert_problem(await alice.http.put(one, json=body), 409, ["body", "movie_id"])
                assert_problem(await alice.http.patch(one, json={"movie_id": unknown}), 409, ["body", "movie_id"])
                edits = [{"id": anna["id"], "movie_id": None}, {"id": harry["id"], "movie_id": unknown}]
                for method, rows in (("POST", [{"name": "Anna"}, body]), ("PATCH", edits)):
                    answer = await alice.http.request(method, "/characters/bulk", json=rows)
                    assert_problem(answer, 409, ["body", 1, "movie_id"])


# --- sizes


@BOTH
@SQLITE_ONLY
async def test_a_body_of_20_mib_is_too_large(service: Service, kind: ResourceCase) -> None:
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
async def test_10_001_rows_are_too_many(service: Service, kind: ResourceCase) -> None:
    rows = [kind.fields("x")] * 10_001
    async with service.person() as alice, nothing_written(service):
        assert_problem(await alice.http.post(f"{kind.path}/bulk", json=rows), 422, ["body"])
        assert_problem(await alice.http.post(f"{kind.path}/bulk?on_error=skip", json=rows), 422, ["body"])
        changes = [{"id": 1, kind.label: "x"}] * 10_001
        assert_problem(await alice.http.patch(f"{kind.path}/bulk", json=changes), 422, ["body"])
        ids = list(range(1, 10_002))
        answer = await alice.http.request("DELETE", f"{kind.path}/bulk", json={"ids": ids})
        assert_problem(answer, 422, ["body", "ids"])
        assert_problem(await alice.http.delete(f"{kind.path}/bulk/1/10001"), 422, ["path", "end_id"])


@BOTH
@SQLITE_ONLY
async def test_invalid_ids_of_a_bulk_deletion_are_rejected(service: Service, kind: ResourceCase) -> None:
    bodies: list[Any] = [{}, {"ids": []}, {"ids": ["1"]}, {"ids": [0]}, {"ids": [1], "x": 1}, {"ids": None}]
    async with service.person() as alice, nothing_written(service):
        for body in bodies:
            assert_problem(await alice.http.request("DELETE", f"{kind.path}/bulk", json=body), 422)


@BOTH
@SQLITE_ONLY
async def test_other_media_types_are_rejected(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        raw = json.dumps(kind.fields("Anna Schmidt")).encode()
        async with nothing_written(service):
            bulk, merge_patch = f"{kind.path}/bulk", "application/merge-patch+json"
            for media_type in ("", "text/plain", "application/xml", "application/jsonx", "text/json", merge_patch):
                headers = {"Content-Type": media_type} if media_type else {}
                for method, path in (("POST", kind.path), ("PUT", f"{kind.path}/1"), ("DELETE", bulk), ("PATCH", bulk)):
                    answer = await alice.http.request(method, path, content=raw, headers=headers)
                    assert_problem(answer, 415)
                    assert answer.json()["detail"] == "Content-Type: expected application/json"
        headers = {"Content-Type": "Application/JSON; charset=utf-8"}
        assert (await alice.http.post(kind.path, content=raw, headers=headers)).status_code == 201


# --- misspelt names


@SQLITE_ONLY
async def test_a_misspelt_name_gets_a_suggestion(service: Service) -> None:
    async with service.person() as alice, service.watch() as watcher, nothing_written(service):
        for method, path, body, suggested in (
            ("POST", "/movies", {"title": "M", "ratng": 1}, "rating"),
            ("PATCH", "/movies/1", {"Titel": "M"}, "title"),
            ("POST", "/movies/bulk", [{"title": "M", "langauges": []}], "languages"),
            ("PATCH", "/users/me", {"user_name": "x"}, "username"),
            ("PATCH", "/users/me/profile", {"gendre": "x"}, "gender"),
            ("GET", "/movies?titel=x", None, "title"),
            ("GET", "/movies?or[0][ratign][gte]=1", None, "rating"),
            ("GET", "/movies/count?offsett=1&genres=x", None, "genre"),
            ("GET", "/movies?sort=-relase_date,title", None, "release_date"),
            ("GET", "/movies?fields=id,titel", None, "title"),
            ("GET", "/events?topic=movies", None, "topics"),
        ):
            answer = await alice.http.request(method, path, json=body)
            assert answer.status_code == 422, path
            assert answer.json()["detail"][-1]["msg"].endswith(f". Did you mean {suggested}?"), path
        strange = await alice.http.get("/movies?planet=mars&sort=planet")
        assert all("Did you mean" not in each["msg"] for each in strange.json()["detail"])
        for member, suggested in (("filter", "genre"), ("filtr", "filter")):
            message = {"id": 1, "action": "subscribe", "topics": ["movies"], member: {"or": [{"genres": "Noir"}]}}
            await watcher.send(message)
            reply = await watcher.until(lambda frame: frame.get("ok") is False)
            assert reply["error"]["detail"][0]["msg"].endswith(f". Did you mean {suggested}?")
        # Skipped rows share the suggestions of one request.
        rows = [{"title": "M", f"titl{number}": 1} for number in (*range(MAX_SUGGESTIONS + 2), 0)]
        skipped = (await alice.http.post("/movies/bulk?on_error=skip", json=rows)).json()["skipped"]
        suggested_in = ["Did you mean title?" in each["detail"][0]["msg"] for each in skipped]
        assert suggested_in == [True] * MAX_SUGGESTIONS + [False, False, True]
        _, refused = await refusal(service, "?topic=movies")
        assert refused["detail"][0]["msg"].endswith(". Did you mean topics?")


# --- paths and queries


@BOTH
@pytest.mark.parametrize("wrong", ["0", "-1", "x", "1.5", str(2**63), "9" * 400, "1%00", "%FF", "١x"])
@SQLITE_ONLY
async def test_an_invalid_id_is_rejected(service: Service, kind: ResourceCase, wrong: str) -> None:
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
async def test_an_unknown_id_is_not_found(service: Service, kind: ResourceCase, unknown: int) -> None:
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


INVALID_PARAMETERS: dict[str, list[Any]] = {
    "limit": [-1, 1001, "x", "9" * 5000, "", "1&limit=2"],
    "offset": [-1, 2**63],
    "skip": [-5],
    "after": [-1],
    "q": ["%00", "x" * 201],
    "titel": ["x"],
    "sort": ["password", "id,id", "id&sort=id", "id&sort=oops", "id,", "--id", "id%00"],
    "user_id": ["x", "9" * 30],
    "user_id[like]": [1],
    "user_id[gte]": [1.5],
    "user_id[contains]": [1],
    "user_id[in]": ["1,x", ",".join(["1"] * 101)],
    "user_id[]": [1],
    "created_at": ["yesterday"],
    "created_at[gte]": ["2020-13-01T00:00:00Z"],
    "description": ["%00", "x" * 1001],
}


@BOTH
@pytest.mark.parametrize(("field", "value"), values_by_field(INVALID_PARAMETERS), ids=lambda each: str(each)[:16])
@SQLITE_ONLY
async def test_an_invalid_parameter_is_named(service: Service, kind: ResourceCase, field: str, value: Any) -> None:
    async with service.person() as alice, nothing_written(service):
        for path in (kind.path, f"{kind.path}/names", f"{kind.path}/user", f"/users/{alice.id}{kind.path}"):
            assert_problem(await alice.http.get(f"{path}?{field}={value}"), 422, ["query", field])


@BOTH
@SQLITE_ONLY
async def test_broken_and_oversized_queries_are_rejected(service: Service, kind: ResourceCase) -> None:
    async with service.anyone() as anonymous, nothing_written(service):
        for query in ("q=%ff", "q=%ed%a0%80", "&".join(f"x{n}=1" for n in range(301))):
            assert_problem(await anonymous.get(f"{kind.path}?{query}"), 422, ["query"])
        many = "&".join("user_id=1" for _ in range(201))
        assert_problem(await anonymous.get(f"{kind.path}?{many}"), 422, ["query"])


@BOTH
async def test_numbers_outside_the_range_of_a_column_match_nothing(service: Service, kind: ResourceCase) -> None:
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
async def test_wildcards_and_quotes_are_matched_literally(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        for label in ("100% wool", "under_score", "back\\slash", 'quote\'s "double"', "semi;colon -- drop"):
            await alice.add(kind.name, **{kind.label: label})
        for text, wanted in (("%", 1), ("_", 1), ("\\", 1), ("'", 1), ('"', 1), ("--", 1), ("/", 0), ("%%", 0)):
            answer = await alice.http.get(f"{kind.path}/user?{kind.label}[contains]={quote(text)}")
            assert len(answer.json()) == wanted, (text, answer.text)
        # A search reads letters and digits only: none of its characters has a meaning in a query language.
        searches = (
            ("%", 5),
            ("\\ ' \" --", 5),
            ("wo%", 1),
            ('"double"', 1),
            ("-drop", 1),
            ("w_ol", 0),
            ("wool OR drop", 0),
        )
        for text, wanted in searches:
            answer = await alice.http.get(f"{kind.path}/user?q={quote(text)}")
            assert len(answer.json()) == wanted, (text, answer.text)


# --- headers


@BOTH
@SQLITE_ONLY
async def test_an_entity_tag_of_absurd_length_matches_nothing(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        one = f"{kind.path}/{(await alice.add(kind.name))['id']}"
        async with nothing_written(service):
            for tag in ('"' + "9" * 5000 + '-0123456789abcdef"', '"', ",,,", '""', "\u00e9"):
                headers = {b"If-Match": tag.encode("latin-1")}
                assert_problem(await alice.http.request("DELETE", one, headers=headers), 412)


# A token for each check that can fail, valid except for what its name says. tests/accounts/test_tokens.py has more.
INVALID_TOKENS: dict[str, Callable[[Person], str]] = {
    "garbage": lambda _: "garbage",
    "not ascii": lambda _: "é.é.é",
    "another key": lambda person: person.forged(key="another key that is long enough too"),
    "expired": lambda person: person.forged(exp=int(time.time()) - 60),
    "a refresh token": lambda person: person.forged(typ="refresh"),
    "an unknown user": lambda person: person.forged(sub=str(10**12)),
    "another user": lambda person: person.forged(sub="1"),
    "a malformed session": lambda person: person.forged(sid="a\0b"),
    "an unknown session": lambda person: person.forged(sid=str(uuid.uuid4())),
}


@pytest.mark.parametrize("made", INVALID_TOKENS.values(), ids=list(INVALID_TOKENS))
async def test_an_invalid_token_is_rejected_on_every_route(service: Service, made: Callable[[Person], str]) -> None:
    async with service.person() as alice, service.anyone() as client, nothing_written(service):
        headers = {b"Authorization": f"Bearer {made(alice)}".encode()}
        for method, path in (("GET", "/auth/me"), ("POST", "/movies"), ("DELETE", "/characters/1"), ("GET", "/movies")):
            answer = await client.request(method, path, headers=headers)
            assert_problem(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"


async def test_a_forged_token_with_valid_claims_is_accepted(service: Service) -> None:
    """Prove that forged tokens can be valid, so that the invalid ones fail only for the reasons in their names."""
    async with service.person() as alice, service.anyone() as client:
        headers = {"Authorization": f"Bearer {alice.forged(jti='0123')}"}
        assert (await client.get("/auth/me", headers=headers)).json()["id"] == alice.id


@SQLITE_ONLY
async def test_other_authorization_schemes_are_rejected(service: Service) -> None:
    async with service.anyone() as client:
        for header in ("Basic Y2hpZWY6eA==", "Bearer", "Token x", "bearer\tx"):
            assert_problem(await client.get("/movies", headers={"Authorization": header}), 401)


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        (["UPDATE users SET is_active = false WHERE id = {}"], 403),
        # The response is the same as for a wrong password.
        (["DELETE FROM sessions WHERE user_id = {}", "DELETE FROM users WHERE id = {}"], 401),
    ],
    ids=["disabled", "deleted"],
)
async def test_the_token_of_a_disabled_or_deleted_user_is_rejected(
    service: Service, changes: list[str], refusal: int
) -> None:
    async with service.person() as alice:
        assert (await alice.http.get("/auth/me")).status_code == 200
        for change in changes:
            await sql(service, change.format(alice.id))
        for method, path in (("GET", "/auth/me"), ("POST", "/movies"), ("GET", "/characters")):
            assert_problem(await alice.http.request(method, path, json={"title": "x"}), 401)
        answer = await sign_in(alice.http, alice.name)
        assert_problem(answer, refusal)


# --- internal errors


def is_logged(service: Service, request_id: str) -> bool:
    """Return whether the request has been logged. Requests are logged after the response."""
    return request_id in service.log()


@SQLITE_ONLY
async def test_a_500_reveals_no_details(new_service: Any) -> None:
    with new_service().running() as service:
        async with service.person() as alice:
            # There is no group `nonsense`, so the service raises an unexpected error.
            await sql(service, f"UPDATE users SET \"group\" = 'nonsense' WHERE id = {alice.id}")
            for method, path in (("GET", "/movies"), ("POST", "/movies")):
                answer = await alice.http.request(method, path, json={"title": "x"})
                assert answer.status_code == 500, answer.text
                assert answer.json() == {"detail": "Internal Server Error"}
                request_id = answer.headers["x-request-id"]
                await eventually(partial(is_logged, service, request_id), "the log has the request id")
            details = await alice.http.get("/movies", headers={"Accept": "application/problem+json"})
            about = {"type": "about:blank", "title": "Internal Server Error", "status": 500}
            assert details.json() == {**about, "detail": "Internal Server Error"}
        async with service.person() as bob:
            await bob.add()


@SQLITE_ONLY
async def test_requests_that_are_not_http_do_no_harm(service: Service) -> None:
    async with nothing_written(service):
        for raw in (b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"POST /movies HTTP/1.1\r\nContent-Length: x\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
            writer.write(raw)
            async with asyncio.timeout(10):
                assert (await reader.read(12)) in (b"HTTP/1.1 400", b"")
            writer.close()
            await writer.wait_closed()


@SQLITE_ONLY
async def test_a_client_that_disconnects_while_sending_its_body_causes_no_error(service: Service) -> None:
    async with service.person() as alice:
        for head in ("Content-Length: 100", "Transfer-Encoding: chunked"):
            reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
            writer.write(
                f"POST /movies HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {alice.token}\r\n"
                f"Expect: 100-continue\r\n"
                f"Content-Type: application/json\r\nX-Request-ID: left-{head[0]}\r\n{head}\r\n\r\n".encode()
            )
            assert (await reader.readline()).startswith(b"HTTP/1.1 100 "), "the service waits for the body"
            writer.close()
            await writer.wait_closed()

            def logged(request_id: str = f"left-{head[0]}") -> list[str]:
                return [line for line in service.log().splitlines() if request_id in line]

            await eventually(logged, "the request is in the log", 10)
            assert not any('"error"' in line for line in logged())


@SQLITE_ONLY
async def test_a_missing_file_of_the_documentation_is_a_404(service: Service) -> None:
    async with service.anyone() as client:
        answer = await client.get("/docs/files/%00")
        assert (answer.status_code, list(answer.json())) == (404, ["detail"])
