"""Single movies and characters: adding, reading, editing and deleting them, and the resulting events."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
import pytest

from tests.support.backends import SQLITE_ONLY
from tests.support.requests import assert_problem, ok
from tests.support.resources import (
    BOTH,
    CHARACTERS,
    MOVIES,
    TIME,
    ResourceCase,
    as_added,
    expect_event,
    head,
    moderator,
    nothing_written,
    watching,
)
from tests.support.service import Service

ETAG = re.compile(r'^"(\d+)-[0-9a-f]{16}"$')


async def get(client: httpx.AsyncClient, kind: ResourceCase, entity_id: int) -> dict[str, Any]:
    found: dict[str, Any] = await ok(client.get(f"{kind.path}/{entity_id}"))
    return found


# --- add and read


@BOTH
async def test_an_added_row_is_returned_whole_and_causes_an_event(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice, service.anyone() as anonymous, watching(service) as watcher:
        answer = await alice.http.post(kind.path, json=kind.full)
        assert answer.status_code == 201
        added = answer.json()
        assert added == as_added(kind, kind.full, added, alice)
        assert TIME.match(added["created_at"])
        assert answer.headers["location"] == f"{kind.path}/{added['id']}"
        await expect_event(watcher, "add", kind, added, alice)
        found = await anonymous.get(answer.headers["location"])
        assert found.json() == added
        assert found.headers["etag"] == answer.headers["etag"]
        assert ETAG.match(found.headers["etag"])


@BOTH
async def test_missing_fields_get_their_defaults(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        added = await ok(alice.http.post(kind.path, json=kind.fields("Ω")), 201)
        assert added == as_added(kind, kind.fields("Ω"), added, alice)


@BOTH
@SQLITE_ONLY
async def test_the_location_keeps_the_prefix(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        answer = await alice.http.post(f"/api/v1{kind.path}/", json=kind.fields("x"))
        assert answer.headers["location"] == f"/api/v1{kind.path}/{answer.json()['id']}"
        assert (await alice.http.get(answer.headers["location"])).json() == answer.json()


@BOTH
async def test_text_comes_back_unchanged(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        for text in ("\x01\x7f\ufffe\uffff É\u0301 日本語 😀 \u202e \u00a0", " spaces kept ", "x" * 255, "😀" * 255):
            added = (await alice.http.post(kind.path, json=kind.fields(text, description=text))).json()
            assert (added[kind.label], added["description"]) == (text, text)
            assert await get(alice.http, kind, added["id"]) == added


@BOTH
async def test_users_add_only_to_their_own_list(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice, service.person() as bob, service.admin() as chief:
        answer = await alice.http.post(f"/users/{alice.id}{kind.path}", json=kind.full)
        assert (answer.status_code, answer.json()["user_id"]) == (201, alice.id)
        assert answer.headers["location"] == f"{kind.path}/{answer.json()['id']}"
        async with nothing_written(service):
            for other in (bob, chief):
                assert_problem(await other.http.post(f"/users/{alice.id}{kind.path}", json=kind.full), 403)


# --- change


@BOTH
async def test_put_replaces_all_fields(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice, service.anyone() as anonymous:
        added = (await alice.http.post(kind.path, json=kind.full)).json()
        async with watching(service) as watcher:
            answer = await alice.http.put(f"{kind.path}/{added['id']}", json=kind.fields("New"))
            assert answer.status_code == 200
            after = answer.json()
            new = kind.fields("New", version=2, updated_at=after["updated_at"])
            assert after == {**added, **kind.defaults, **new}
            assert after["updated_at"] > added["updated_at"]
            changed = [name for name in kind.full if added[name] != after[name]]
            event = await watcher.next()
            assert sorted(event["changed"]) == sorted(changed)
            assert (event["operation"], event["data"]) == ("update", after)
            assert await get(anonymous, kind, added["id"]) == after
            assert ETAG.match(answer.headers["etag"])[1] == "2"  # type: ignore[index]


@BOTH
async def test_patch_changes_only_the_given_fields(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        added = (await alice.http.post(kind.path, json=kind.full)).json()
        one = f"{kind.path}/{added['id']}"
        async with watching(service) as watcher:
            after = await ok(alice.http.patch(one, json={kind.label: "New"}))
            assert after == {**added, kind.label: "New", "version": 2, "updated_at": after["updated_at"]}
            await expect_event(watcher, "update", kind, after, alice, [kind.label])
            merge_patch = {"Content-Type": "application/merge-patch+json"}
            cleared = (await alice.http.patch(one, content=b'{"description": null}', headers=merge_patch)).json()
            assert cleared == {**after, "description": None, "version": 3, "updated_at": cleared["updated_at"]}
            await expect_event(watcher, "update", kind, cleared, alice, ["description"])
            assert await get(alice.http, kind, added["id"]) == cleared


async def test_null_clears_each_field_of_a_movie(service: Service) -> None:
    async with service.person() as alice:
        path = f"/movies/{(await alice.add(**MOVIES.full))['id']}"
        for field in (name for name, default in MOVIES.defaults.items() if default is None):
            assert (await ok(alice.http.patch(path, json={field: None})))[field] is None


@BOTH
async def test_an_edit_that_changes_nothing_writes_nothing(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        added = (await alice.http.post(kind.path, json=kind.full)).json()
        one = f"{kind.path}/{added['id']}"
        etag = (await alice.http.get(one)).headers["etag"]
        async with nothing_written(service):
            for answer in (
                await alice.http.put(one, json=kind.full),
                await alice.http.patch(one, json=kind.full),
                await alice.http.patch(one, json={}),
                await alice.http.patch(one, json={kind.label: kind.full[kind.label]}),
                await alice.http.patch(f"{kind.path}/bulk", json=[{"id": added["id"]} | kind.full]),
            ):
                assert answer.status_code == 200
                assert answer.headers.get("etag", etag) == etag
                assert answer.json() in (added, {"updated": [added], "not_found": []})


@BOTH
async def test_the_event_of_a_deletion_holds_the_id(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice, watching(service) as watcher:
        added = await alice.add(kind.name)
        await expect_event(watcher, "add", kind, added, alice)
        answer = await alice.http.delete(f"{kind.path}/{added['id']}")
        assert (answer.status_code, answer.content) == (204, b"")
        await expect_event(watcher, "delete", kind, {"id": added["id"]}, alice)
        async with nothing_written(service):
            assert (await alice.http.get(f"{kind.path}/{added['id']}")).status_code == 404
            assert (await alice.http.delete(f"{kind.path}/{added['id']}")).status_code == 404


@BOTH
async def test_ids_are_never_reused(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        first = await alice.add(kind.name)
        await alice.http.delete(f"{kind.path}/{first['id']}")
        again = await alice.add(kind.name)
        assert again["id"] > first["id"]
        await alice.http.delete(f"{kind.path}/{again['id']}")
        bulk = (await alice.http.post(f"{kind.path}/bulk", json=[kind.fields("x")])).json()["added"][0]
        assert bulk["id"] > again["id"]
        await alice.http.delete(f"{kind.path}/{bulk['id']}")
        assert (await alice.add(kind.name))["id"] > bulk["id"]


# --- rights


def writes(kind: ResourceCase, entity_id: int) -> list[tuple[str, str, Any]]:
    return [
        ("PUT", f"{kind.path}/{entity_id}", kind.fields("theirs")),
        ("PATCH", f"{kind.path}/{entity_id}", kind.fields("theirs again")),
        ("PATCH", f"{kind.path}/bulk", [{"id": entity_id, kind.label: "in bulk"}]),
        ("DELETE", f"{kind.path}/{entity_id}", None),
        ("DELETE", f"{kind.path}/bulk", {"ids": [entity_id]}),
        ("DELETE", f"{kind.path}/bulk/{entity_id}/{entity_id}", None),
    ]


@BOTH
async def test_other_users_change_nothing(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice, service.person() as bob, service.anyone() as anonymous:
        mine = await alice.add(kind.name)
        async with nothing_written(service):
            for method, path, body in writes(kind, mine["id"]):
                answer = await bob.http.request(method, path, json=body)
                assert answer.status_code == 403, (method, path)
                assert isinstance(answer.json()["detail"], str)
            # Rights are checked before the tag, so even a stale tag results in a 403.
            stale = {"If-Match": '"9-0123456789abcdef"'}
            assert (await bob.http.delete(f"{kind.path}/{mine['id']}", headers=stale)).status_code == 403
        assert await get(anonymous, kind, mine["id"]) == mine


@BOTH
@pytest.mark.parametrize("who", ["owner", "moderator", "admin"])
async def test_owners_moderators_and_admins_change(service: Service, kind: ResourceCase, who: str) -> None:
    async with service.person() as alice, service.admin() as chief, moderator(service) as mod:
        actor = {"owner": alice, "moderator": mod, "admin": chief}[who]
        for position in range(len(writes(kind, 0))):
            mine = await alice.add(kind.name)
            method, path, body = writes(kind, mine["id"])[position]
            async with watching(service) as watcher:
                answer = await actor.http.request(method, path, json=body)
                assert answer.status_code in (200, 204), (method, path, answer.text)
                assert (await watcher.next())["actor_id"] == actor.id
            if method != "DELETE":
                after = await get(alice.http, kind, mine["id"])
                assert (after["user_id"], after["version"]) == (alice.id, 2)  # an edit does not change the owner


# --- entity tags


@BOTH
async def test_if_none_match_returns_304_for_a_current_tag(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        one = f"{kind.path}/{(await alice.add(kind.name))['id']}"
        etag = (await alice.http.get(one)).headers["etag"]
        for known in (etag, f"W/{etag}", f'"other", {etag}', "*", f'{etag[:-1]}-gzip"', f'W/"x", W/{etag}'):
            answer = await alice.http.get(one, headers={"If-None-Match": known})
            assert (answer.status_code, answer.content) == (304, b""), known
            assert answer.headers["etag"] == etag
        lines = [("If-None-Match", '"other"'), ("If-None-Match", etag)]
        assert (await alice.http.get(one, headers=lines)).status_code == 304
        for stale in ('"1-0123456789abcdef"', '"other"', etag.strip('"')):
            assert (await alice.http.get(one, headers={"If-None-Match": stale})).status_code == 200
        await alice.http.patch(one, json={kind.label: "New"})
        assert (await alice.http.get(one, headers={"If-None-Match": etag})).status_code == 200


@BOTH
async def test_if_match_rejects_a_stale_tag(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        one = f"{kind.path}/{(await alice.add(kind.name))['id']}"
        first = (await alice.http.get(one)).headers["etag"]
        second = (await alice.http.patch(one, json={kind.label: "New"})).headers["etag"]
        async with nothing_written(service):
            for tag in (first, f"W/{first}", '"other"', "2", f'{first}, "x"', '"2-nothexdigits0000"', ""):
                for method, body in (("PUT", kind.fields("x")), ("PATCH", kind.fields("x")), ("DELETE", None)):
                    answer = await alice.http.request(method, one, json=body, headers={"If-Match": tag})
                    assert answer.status_code == 412, (tag, answer.text)
        assert (await alice.http.get(one)).headers["etag"] == second


@BOTH
async def test_if_match_accepts_a_current_tag(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        one = f"{kind.path}/{(await alice.add(kind.name))['id']}"
        tag = (await alice.http.get(one)).headers["etag"]
        for n, form in enumerate(("{}", '"other", {}', "*", "{} , {}", "W/{}", '"other", W/{}')):
            headers = {"If-Match": form.replace("{}", tag)}
            answer = await alice.http.patch(one, json=kind.fields(f"{n}"), headers=headers)
            assert answer.status_code == 200, form
            tag = answer.headers["etag"]
        answer = await alice.http.put(
            one, json=kind.fields("put"), headers=[("If-Match", '"other"'), ("If-Match", f"W/{tag}")]
        )
        tag = answer.headers["etag"]
        assert (await alice.http.delete(one, headers={"If-Match": tag})).status_code == 204


@SQLITE_ONLY
async def test_a_range_is_ignored(service: Service) -> None:
    async with service.person() as alice:
        paths = ("/", "/static/base.css", "/docs/files/start.js", "/docs", "/openapi.json", "/movies", "/users/me")
        for path in paths:
            whole = await alice.http.get(path)
            for wanted in ("bytes=0-3", "bytes=999999999-", "bytes=0-1,3-4", "items=0-3", "bytes", "bytes=5-1", ""):
                answer = await alice.http.get(path, headers={"Range": wanted})
                assert (answer.status_code, answer.content) == (200, whole.content), (path, wanted)
                assert answer.headers.get("accept-ranges", "none") == "none"


@BOTH
async def test_only_one_of_several_concurrent_edits_with_a_tag_succeeds(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        one = f"{kind.path}/{(await alice.add(kind.name))['id']}"
        tag = (await alice.http.get(one)).headers["etag"]
        before = await head(service)
        answers = await asyncio.gather(
            *(alice.http.patch(one, json=kind.fields(f"n{n}"), headers={"If-Match": tag}) for n in range(8))
        )
        assert sorted(answer.status_code for answer in answers) == [200] + [412] * 7
        assert (await get(alice.http, kind, int(one.rsplit("/", 1)[1])))["version"] == 2
        assert await head(service) == before + 1


@BOTH
async def test_concurrent_edits_without_a_tag_all_succeed(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        one = f"{kind.path}/{(await alice.add(kind.name))['id']}"
        await asyncio.gather(*(alice.http.patch(one, json=kind.fields(f"n{n}")) for n in range(20)))
        assert (await alice.http.get(one)).json()["version"] == 21


# --- movies and their characters


async def test_a_movie_counts_its_characters(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        first, second = await alice.add(), await alice.add()
        tag = (await alice.http.get(f"/movies/{first['id']}")).headers["etag"]
        async with watching(service) as watcher:
            # A user may add a character to the movie of another user.
            harry = await bob.add("characters", movie_id=first["id"])
            await expect_event(watcher, "add", CHARACTERS, harry, bob)
            first["characters_count"] = 1
            await expect_event(watcher, "update", MOVIES, first, bob, ["characters_count"])
            answer = await alice.http.get(f"/movies/{first['id']}")
            assert answer.json() == first  # version and updated_at are unchanged
            assert answer.headers["etag"] != tag
            # A write compares only the version in the tag, so a new count does not make the tag stale.
            title = {"title": "The Third Man!"}
            first = await ok(alice.http.patch(f"/movies/{first['id']}", json=title, headers={"If-Match": tag}))
            await expect_event(watcher, "update", MOVIES, first, alice, ["title"])

            moved = (await bob.http.patch(f"/characters/{harry['id']}", json={"movie_id": second["id"]})).json()
            await expect_event(watcher, "update", CHARACTERS, moved, bob, ["movie_id"])
            first["characters_count"], second["characters_count"] = 0, 1
            await expect_event(
                watcher, "update_bulk", MOVIES, {"count": 2, "items": [first, second]}, bob, ["characters_count"]
            )

            await bob.http.delete(f"/characters/{harry['id']}")
            await expect_event(watcher, "delete", CHARACTERS, {"id": harry["id"]}, bob)
            second["characters_count"] = 0
            await expect_event(watcher, "update", MOVIES, second, bob, ["characters_count"])
        assert await get(alice.http, MOVIES, first["id"]) == first
        assert await get(alice.http, MOVIES, second["id"]) == second


async def test_an_edit_of_a_character_does_not_change_its_movie(service: Service) -> None:
    async with service.person() as alice:
        movie = await alice.add()
        harry = await alice.add("characters", movie_id=movie["id"])
        before = await head(service)
        await alice.http.put(f"/characters/{harry['id']}", json={"name": "H. Lime", "movie_id": movie["id"]})
        assert await head(service) == before + 1
        assert (await get(alice.http, MOVIES, movie["id"]))["characters_count"] == 1


async def test_a_character_outlives_its_movie(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        movie = await alice.add()
        harry = await bob.add("characters", movie_id=movie["id"])
        async with watching(service) as watcher:
            assert (await alice.http.delete(f"/movies/{movie['id']}")).status_code == 204
            left = await get(bob.http, CHARACTERS, harry["id"])
            assert left == {**harry, "movie_id": None, "version": 2, "updated_at": left["updated_at"]}
            await expect_event(watcher, "update", CHARACTERS, left, alice, ["movie_id"])
            await expect_event(watcher, "delete", MOVIES, {"id": movie["id"]}, alice)


async def test_concurrently_added_characters_are_all_counted(service: Service) -> None:
    async with service.person() as alice:
        movie = await alice.add()
        await asyncio.gather(*(alice.add("characters", movie_id=movie["id"]) for _ in range(20)))
        assert (await get(alice.http, MOVIES, movie["id"]))["characters_count"] == 20


async def test_a_movie_deleted_while_characters_are_added_leaves_none_behind(service: Service) -> None:
    async with service.person() as alice:
        for _ in range(5):
            movie = await alice.add()
            body = {"name": "Harry Lime", "movie_id": movie["id"]}
            answers = await asyncio.gather(
                *(alice.http.post("/characters", json=body) for _ in range(4)),
                alice.http.delete(f"/movies/{movie['id']}"),
                *(alice.http.post("/characters", json=body) for _ in range(4)),
            )
            assert answers[4].status_code == 204
            assert {answer.status_code for answer in answers} <= {201, 204, 409}
            assert (await alice.http.get(f"/characters/count?movie_id={movie['id']}")).json() == {"count": 0}


async def test_a_movie_includes_its_characters_on_request(service: Service) -> None:
    async with service.person() as alice:
        movie = await alice.add()
        cast = [await alice.add("characters", name=name, movie_id=movie["id"]) for name in ("Harry", "Anna")]
        movie["characters_count"] = 2
        answer = await alice.http.get(f"/movies/{movie['id']}?include=characters")
        assert answer.json() == {**movie, "characters": cast}
        assert answer.headers["etag"] != (await alice.http.get(f"/movies/{movie['id']}")).headers["etag"]
        comment = await ok(alice.http.post(f"/movies/{movie['id']}/comments", json={"text": "Zither!"}), 201)
        rating = await ok(alice.http.post(f"/movies/{movie['id']}/ratings", json={"score": 9}), 201)
        await ok(alice.http.post("/watchlist", json={"movie_id": movie["id"]}), 201)
        movie |= {"comments_count": 1, "average_rating": 9.0, "ratings_count": 1}
        included = await ok(alice.http.get(f"/movies/{movie['id']}?include=ratings,characters,comments"))
        assert included == {**movie, "characters": cast, "comments": [comment], "ratings": [rating]}
        assert "comments" not in await ok(alice.http.get(f"/movies/{movie['id']}?include=characters,ratings"))
        for names in ("actors", "characters,", "characters,actors", "watchlist", ""):
            answer = await alice.http.get(f"/movies/{movie['id']}?include={names}")
            assert_problem(answer, 422, ["query", "include"])
            assert "one or more of characters, comments, ratings" in answer.json()["detail"][0]["msg"]
        assert (await alice.http.get(f"/characters/{cast[0]['id']}?include=characters")).status_code == 422
