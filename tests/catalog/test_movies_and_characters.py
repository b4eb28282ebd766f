"""One movie, one character: adding, reading, changing and deleting them, and what watchers are told of it."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
import pytest

from tests.support.resources import (
    BOTH,
    CHARACTERS,
    MOVIES,
    ResourceCase,
    derived,
    head,
    moderator,
    nothing_written,
    watching,
)
from tests.support.service import Person, Service, Watcher

TIME = re.compile(r"^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$")
ETAG = re.compile(r'^"(\d+)-[0-9a-f]{16}"$')


async def told(
    watcher: Watcher, operation: str, kind: ResourceCase, data: Any, actor: Person, changed: list[str] | None = None
) -> None:
    """The next event is this one, whole: exactly these keys, and the number after the last."""
    last = watcher.events[-1]["seq"] if watcher.events else watcher.welcome["data"]["seq"]
    event = await watcher.expect(operation, kind.name)
    wanted = {
        "operation": operation,
        "topic": kind.name,
        "seq": last + 1,
        "data": data,
        "actor_id": actor.id,
        "ts": event["ts"],
    }
    if changed is not None:
        wanted["changed"] = changed
    assert event == wanted
    assert TIME.match(event["ts"])


async def get(client: httpx.AsyncClient, kind: ResourceCase, entity_id: int) -> dict[str, Any]:
    found: dict[str, Any] = await ok(client.get(f"{kind.path}/{entity_id}"))
    return found


# --- add and read


@BOTH
async def test_what_is_added_is_answered_whole_and_told(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice, service.anyone() as anonymous, watching(service) as watcher:
        answer = await alice.http.post(kind.path, json=kind.full)
        assert answer.status_code == 201
        added = answer.json()
        assert added == {
            **kind.full,
            **derived(kind),
            "id": added["id"],
            "user_id": alice.id,
            "version": 1,
            "created_at": added["created_at"],
            "updated_at": added["created_at"],
        }
        assert TIME.match(added["created_at"])
        assert answer.headers["location"] == f"{kind.path}/{added['id']}"
        await told(watcher, "add", kind, added, alice)
        found = await anonymous.get(answer.headers["location"])
        assert found.json() == added
        assert found.headers["etag"] == answer.headers["etag"]
        assert ETAG.match(found.headers["etag"])


@BOTH
async def test_what_is_left_out_takes_its_default(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        added = (await alice.http.post(kind.path, json=kind.fields("Ω"))).json()
        assert added | kind.defaults | kind.fields("Ω") == added


@BOTH
async def test_the_location_keeps_the_prefix(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        answer = await alice.http.post(f"/api/v1{kind.path}/", json=kind.fields("x"))
        assert answer.headers["location"] == f"/api/v1{kind.path}/{answer.json()['id']}"
        assert (await alice.http.get(answer.headers["location"])).json() == answer.json()


@BOTH
async def test_text_comes_back_as_it_went_in(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        for text in ("É\u0301 日本語 😀 \u202e \u00a0", " spaces kept ", "\x01\x7f\ufffe\uffff", "x" * 255, "😀" * 255):
            added = (await alice.http.post(kind.path, json=kind.fields(text, description=text))).json()
            assert (added[kind.label], added["description"]) == (text, text)
            assert await get(alice.http, kind, added["id"]) == added


@BOTH
async def test_only_the_signed_in_add(service: Service, kind: ResourceCase) -> None:
    async with service.anyone() as anonymous, nothing_written(service):
        answer = await anonymous.post(kind.path, json=kind.full)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert isinstance(answer.json()["detail"], str)


@BOTH
async def test_a_user_adds_under_the_own_address_only(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice, service.person() as bob, service.admin() as chief, service.anyone() as anonymous:
        answer = await alice.http.post(f"/users/{alice.id}{kind.path}", json=kind.full)
        assert answer.status_code == 201
        assert answer.json()["user_id"] == alice.id
        assert answer.headers["location"] == f"{kind.path}/{answer.json()['id']}"
        async with nothing_written(service):
            for client, status in ((bob.http, 403), (chief.http, 403), (anonymous, 401)):
                assert (await client.post(f"/users/{alice.id}{kind.path}", json=kind.full)).status_code == status


# --- change


@BOTH
async def test_put_replaces_everything(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice, service.anyone() as anonymous:
        added = (await alice.http.post(kind.path, json=kind.full)).json()
        async with watching(service) as watcher:
            answer = await alice.http.put(f"{kind.path}/{added['id']}", json=kind.fields("New"))
            assert answer.status_code == 200
            after = answer.json()
            assert after == {
                **added,
                **kind.defaults,
                **kind.fields("New"),
                "version": 2,
                "updated_at": after["updated_at"],
            }
            assert after["updated_at"] > added["updated_at"]
            changed = [name for name in kind.full if added[name] != after[name]]
            event = await watcher.next()
            assert sorted(event["changed"]) == sorted(changed)
            assert (event["operation"], event["data"]) == ("update", after)
            assert await get(anonymous, kind, added["id"]) == after
            assert ETAG.match(answer.headers["etag"])[1] == "2"  # type: ignore[index]


@BOTH
async def test_patch_changes_what_it_names(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        added = (await alice.http.post(kind.path, json=kind.full)).json()
        one = f"{kind.path}/{added['id']}"
        async with watching(service) as watcher:
            after = await ok(alice.http.patch(one, json={kind.label: "New"}))
            assert after == {**added, kind.label: "New", "version": 2, "updated_at": after["updated_at"]}
            await told(watcher, "update", kind, after, alice, [kind.label])
            cleared = (await alice.http.patch(one, json={"description": None})).json()
            assert cleared == {**after, "description": None, "version": 3, "updated_at": cleared["updated_at"]}
            await told(watcher, "update", kind, cleared, alice, ["description"])
            assert await get(alice.http, kind, added["id"]) == cleared


@pytest.mark.parametrize("field", [name for name, default in MOVIES.defaults.items() if default is None])
async def test_null_clears_each_field_of_a_movie(service: Service, field: str) -> None:
    async with service.person() as alice:
        added = await alice.add(**MOVIES.full)
        answer = await alice.http.patch(f"/movies/{added['id']}", json={field: None})
        assert answer.json()[field] is None


@BOTH
async def test_an_edit_that_changes_nothing_is_no_edit(service: Service, kind: ResourceCase) -> None:
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
async def test_a_delete_is_told_by_its_id(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice, watching(service) as watcher:
        added = await alice.add(kind.name)
        await told(watcher, "add", kind, added, alice)
        answer = await alice.http.delete(f"{kind.path}/{added['id']}")
        assert (answer.status_code, answer.content) == (204, b"")
        await told(watcher, "delete", kind, {"id": added["id"]}, alice)
        async with nothing_written(service):
            assert (await alice.http.get(f"{kind.path}/{added['id']}")).status_code == 404
            assert (await alice.http.delete(f"{kind.path}/{added['id']}")).status_code == 404


@BOTH
async def test_an_id_is_never_given_again(service: Service, kind: ResourceCase) -> None:
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


# --- whose it is


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
async def test_others_change_nothing(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice, service.person() as bob, service.anyone() as anonymous:
        mine = await alice.add(kind.name)
        async with nothing_written(service):
            for client, status in ((bob.http, 403), (anonymous, 401)):
                for method, path, body in writes(kind, mine["id"]):
                    answer = await client.request(method, path, json=body)
                    assert answer.status_code == status, (method, path)
                    assert isinstance(answer.json()["detail"], str)
        assert await get(anonymous, kind, mine["id"]) == mine


@BOTH
async def test_a_stranger_with_a_stale_tag_is_still_a_stranger(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice, service.person() as bob:
        mine = await alice.add(kind.name)
        answer = await bob.http.delete(f"{kind.path}/{mine['id']}", headers={"If-Match": '"9-0123456789abcdef"'})
        assert answer.status_code == 403


@BOTH
@pytest.mark.parametrize("who", ["owner", "moderator", "admin"])
async def test_owners_moderators_and_admins_change(service: Service, kind: ResourceCase, who: str) -> None:
    async with service.person() as alice, service.admin() as chief, moderator(service) as mod:
        actor = {"owner": alice, "moderator": mod, "admin": chief}[who]
        for position, (method, path, body) in enumerate(writes(kind, 0)):
            mine = await alice.add(kind.name)
            path = path.replace("/0", f"/{mine['id']}")
            body = writes(kind, mine["id"])[position][2]
            async with watching(service) as watcher:
                answer = await actor.http.request(method, path, json=body)
                assert answer.status_code in (200, 204), (method, path, answer.text)
                assert (await watcher.next())["actor_id"] == actor.id
            if method != "DELETE":
                after = await get(alice.http, kind, mine["id"])
                assert (after["user_id"], after["version"]) == (alice.id, 2)  # a change does not change whose it is


# --- entity tags


@BOTH
async def test_who_has_it_is_not_sent_it_again(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        one = f"{kind.path}/{(await alice.add(kind.name))['id']}"
        etag = (await alice.http.get(one)).headers["etag"]
        for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            answer = await alice.http.get(one, headers={"If-None-Match": known})
            assert (answer.status_code, answer.content) == (304, b""), known
            assert answer.headers["etag"] == etag
        for stale in ('"1-0123456789abcdef"', '"other"', etag.strip('"')):
            assert (await alice.http.get(one, headers={"If-None-Match": stale})).status_code == 200
        await alice.http.patch(one, json={kind.label: "New"})
        assert (await alice.http.get(one, headers={"If-None-Match": etag})).status_code == 200


@BOTH
async def test_a_stale_tag_changes_nothing(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        one = f"{kind.path}/{(await alice.add(kind.name))['id']}"
        first = (await alice.http.get(one)).headers["etag"]
        second = (await alice.http.patch(one, json={kind.label: "New"})).headers["etag"]
        async with nothing_written(service):
            for tag in (first, f"W/{second}", '"other"', "2", f'{first}, "x"', '"2-nothexdigits0000"', ""):
                for method, body in (("PUT", kind.fields("x")), ("PATCH", kind.fields("x")), ("DELETE", None)):
                    answer = await alice.http.request(method, one, json=body, headers={"If-Match": tag})
                    assert answer.status_code == 412, (tag, answer.text)
        assert (await alice.http.get(one)).headers["etag"] == second


@BOTH
async def test_a_fresh_tag_lets_the_change_through(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        one = f"{kind.path}/{(await alice.add(kind.name))['id']}"
        tag = (await alice.http.get(one)).headers["etag"]
        for n, form in enumerate(("{}", '"other", {}', "*", "{} , {}")):
            answer = await alice.http.patch(
                one, json=kind.fields(f"{n}"), headers={"If-Match": form.replace("{}", tag)}
            )
            assert answer.status_code == 200, form
            tag = answer.headers["etag"]
        answer = await alice.http.put(one, json=kind.fields("put"), headers={"If-Match": tag})
        tag = answer.headers["etag"]
        assert (await alice.http.delete(one, headers={"If-Match": tag})).status_code == 204


@BOTH
async def test_of_two_edits_at_once_one_loses(service: Service, kind: ResourceCase) -> None:
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
async def test_edits_at_once_are_all_counted(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        one = f"{kind.path}/{(await alice.add(kind.name))['id']}"
        await asyncio.gather(*(alice.http.patch(one, json=kind.fields(f"n{n}")) for n in range(20)))
        assert (await alice.http.get(one)).json()["version"] == 21


# --- movies and their characters


async def test_a_movie_counts_its_characters_and_says_so(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        first, second = await alice.add(), await alice.add()
        tag = (await alice.http.get(f"/movies/{first['id']}")).headers["etag"]
        async with watching(service) as watcher:
            # Who adds a character need not own the movie.
            harry = await bob.add("characters", movie_id=first["id"])
            await told(watcher, "add", CHARACTERS, harry, bob)
            first["characters_count"] = 1
            await told(watcher, "update", MOVIES, first, bob, ["characters_count"])
            answer = await alice.http.get(f"/movies/{first['id']}")
            assert answer.json() == first  # version and updated_at as they were
            assert answer.headers["etag"] != tag
            # The tag's version is what counts for writes: the derived count makes nobody's copy stale.
            title = {"title": "The Third Man!"}
            first = await ok(alice.http.patch(f"/movies/{first['id']}", json=title, headers={"If-Match": tag}))
            await told(watcher, "update", MOVIES, first, alice, ["title"])

            moved = (await bob.http.patch(f"/characters/{harry['id']}", json={"movie_id": second["id"]})).json()
            await told(watcher, "update", CHARACTERS, moved, bob, ["movie_id"])
            first["characters_count"], second["characters_count"] = 0, 1
            await told(
                watcher, "update_bulk", MOVIES, {"count": 2, "items": [first, second]}, bob, ["characters_count"]
            )

            await bob.http.delete(f"/characters/{harry['id']}")
            await told(watcher, "delete", CHARACTERS, {"id": harry["id"]}, bob)
            second["characters_count"] = 0
            await told(watcher, "update", MOVIES, second, bob, ["characters_count"])
        assert await get(alice.http, MOVIES, first["id"]) == first
        assert await get(alice.http, MOVIES, second["id"]) == second


async def test_an_edit_within_a_movie_leaves_the_movie_alone(service: Service) -> None:
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
            await told(watcher, "update", CHARACTERS, left, alice, ["movie_id"])
            await told(watcher, "delete", MOVIES, {"id": movie["id"]}, alice)


async def test_characters_added_at_once_are_all_counted(service: Service) -> None:
    async with service.person() as alice:
        movie = await alice.add()
        await asyncio.gather(*(alice.add("characters", movie_id=movie["id"]) for _ in range(20)))
        assert (await get(alice.http, MOVIES, movie["id"]))["characters_count"] == 20


async def test_a_movie_deleted_while_characters_come_leaves_none_astray(service: Service) -> None:
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


async def test_a_movie_comes_with_its_characters_when_asked(service: Service) -> None:
    async with service.person() as alice:
        movie = await alice.add()
        cast = [await alice.add("characters", name=name, movie_id=movie["id"]) for name in ("Harry", "Anna")]
        movie["characters_count"] = 2
        answer = await alice.http.get(f"/movies/{movie['id']}?include=characters")
        assert answer.json() == {**movie, "characters": cast}
        assert answer.headers["etag"] != (await alice.http.get(f"/movies/{movie['id']}")).headers["etag"]
        assert (await alice.http.get(f"/movies/{movie['id']}?include=actors")).status_code == 422
        assert (await alice.http.get(f"/characters/{cast[0]['id']}?include=characters")).status_code == 422
