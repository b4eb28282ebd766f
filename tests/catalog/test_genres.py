"""Genres have unique names, are edited by moderators and admins, and can be read and watched by everyone."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from tests.support.backends import SQLITE_ONLY
from tests.support.requests import assert_problem, ok, over_socket
from tests.support.resources import locations, moderator, nothing_written, watching
from tests.support.service import Person, Service
from tests.support.sockets import rows_of, subscribed


async def add(person: Person, name: str, **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = await ok(person.http.post("/genres", json={"name": name, **fields}), 201)
    return found


def assert_taken(answer: httpx.Response, *locs: list[Any]) -> None:
    assert_problem(answer, 409, *locs)
    assert {problem["type"] for problem in answer.json()["detail"]} == {"taken"}


async def test_watchers_see_a_moderator_add_edit_and_delete_a_genre(service: Service) -> None:
    async with moderator(service) as mona, service.anyone() as reader, watching(service) as watcher:
        answer = await mona.http.post("/genres", json={"name": "Film Gris"})
        assert answer.status_code == 201
        genre = answer.json()
        assert answer.headers["location"] == f"/genres/{genre['id']}"
        times = {"created_at": genre["created_at"], "updated_at": genre["created_at"]}
        assert genre == {
            "id": genre["id"],
            "name": "Film Gris",
            "description": None,
            "movies_count": 0,
            "version": 1,
            **times,
        }
        assert (await watcher.expect("add", "genres"))["data"] == genre
        assert (await reader.get(answer.headers["location"])).json() == genre

        fields: dict[str, Any] = {"description": "Noir with a cause."}
        changed = await ok(mona.http.patch(f"/genres/{genre['id']}", json=fields))
        assert changed == genre | fields | {"version": 2, "updated_at": changed["updated_at"]}
        event = await watcher.expect("update", "genres")
        assert (event["data"], event["changed"]) == (changed, ["description"])

        replaced = (await mona.http.put(f"/genres/{genre['id']}", json={"name": "Gris"})).json()
        assert (replaced["name"], replaced["description"], replaced["version"]) == ("Gris", None, 3)
        assert sorted((await watcher.expect("update", "genres"))["changed"]) == ["description", "name"]

        stale = {"If-Match": f'"1-{"0" * 16}"'}
        assert (await mona.http.delete(f"/genres/{genre['id']}", headers=stale)).status_code == 412
        assert (await mona.http.delete(f"/genres/{genre['id']}")).status_code == 204
        assert (await watcher.expect("delete", "genres"))["data"] == {"id": genre["id"]}
        assert (await reader.get(f"/genres/{genre['id']}")).status_code == 404


async def test_only_moderators_and_admins_write_genres(service: Service) -> None:
    async with moderator(service) as mona, service.person() as alice, service.anyone() as anonymous:
        one = f"/genres/{(await add(mona, 'Peplum'))['id']}"
        number = int(one.rpartition("/")[2])
        requests: list[tuple[str, str, Any]] = [
            ("POST", "/genres", {"name": "Giallo"}),
            ("PUT", one, {"name": "Giallo"}),
            ("PATCH", one, {"name": "Giallo"}),
            ("DELETE", one, None),
            ("POST", "/genres/bulk", [{"name": "Giallo"}]),
            ("PATCH", "/genres/bulk", [{"id": number, "name": "Giallo"}]),
            ("DELETE", "/genres/bulk", {"ids": [number]}),
            ("DELETE", f"/genres/bulk/{number}/{number}", None),
        ]
        async with nothing_written(service):
            for method, path, body in requests:
                for client, status in ((alice.http, 403), (anonymous, 401)):
                    answer = await client.request(method, path, json=body)
                    assert answer.status_code == status, (method, path, answer.text)
        async with service.admin() as chief:
            assert (await chief.http.patch(one, json={"name": "Sword and Sandal"})).status_code == 200


async def test_genres_belong_to_no_user_and_are_not_generated(service: Service) -> None:
    async with service.admin() as chief:
        assert (await chief.http.get("/genres/user")).status_code == 422, "`user` is parsed as the id of a genre"
        assert (await chief.http.get(f"/users/{chief.id}/genres")).status_code == 404
        assert (await chief.http.post(f"/users/{chief.id}/genres", json={"name": "x"})).status_code == 404
        assert (await chief.http.post("/genres/generate/5")).status_code == 404
        assert (await chief.http.post("/genres", json={"name": "x", "name_key": "y"})).status_code == 422


@SQLITE_ONLY
async def test_invalid_names_are_rejected(service: Service) -> None:
    async with service.admin() as chief, nothing_written(service):
        for name in ("", "   ", "\u00a0", "a\x00b", "a\nb", "a\u202eb", "x" * 101, 7, None, ["x"]):
            assert_problem(await chief.http.post("/genres", json={"name": name}), 422, ["body", "name"])
        assert locations(await chief.http.post("/genres", json={"description": "x"})) == [["body", "name"]]


@SQLITE_ONLY
async def test_surrounding_spaces_are_removed_from_names(service: Service) -> None:
    async with moderator(service) as mona:
        assert (await add(mona, " Rubble \t"))["name"] == "Rubble"
        answer = await mona.http.post("/genres", json={"name": "\u3000rubble"})
        assert_taken(answer, ["body", "name"])
        assert answer.json()["detail"][0]["msg"] == "There is already a genre with the name Rubble"


@SQLITE_ONLY
async def test_a_conflict_names_at_most_a_hundred_rows(service: Service) -> None:
    async with moderator(service) as mona:
        answer = await mona.http.post("/genres/bulk", json=[{"name": "Many"}] * 150)
        assert_taken(answer, *(["body", index, "name"] for index in range(1, 101)))


async def test_names_are_unique_regardless_of_case_and_width(service: Service) -> None:
    async with moderator(service) as mona:
        screwball = await add(mona, "Screwball")
        wuxia = await add(mona, "Wuxia")
        async with nothing_written(service):
            for name in ("Screwball", "SCREWBALL", "\uff33crewball"):
                assert_taken(await mona.http.post("/genres", json={"name": name}), ["body", "name"])
            path = f"/genres/{wuxia['id']}"
            assert_taken(await mona.http.put(path, json={"name": "screwball"}), ["body", "name"])
            assert_taken(await mona.http.patch(path, json={"name": "screwball"}), ["body", "name"])
        renamed = await mona.http.patch(f"/genres/{screwball['id']}", json={"name": "SCREWBALL"})
        assert renamed.json()["name"] == "SCREWBALL", "a row does not conflict with its own name"
        assert (await mona.http.delete(f"/genres/{screwball['id']}")).status_code == 204
        assert (await add(mona, "screwball"))["id"] > wuxia["id"], "the name is free again, but the id is not reused"


async def test_the_longest_names_are_unique_too(service: Service) -> None:
    # Each character becomes eighteen characters when it is normalised, so the key would not fit into its column.
    name = "\ufdfa" * 100
    async with moderator(service) as mona:
        await add(mona, name)
        assert_taken(await mona.http.post("/genres", json={"name": name}), ["body", "name"])


async def test_a_bulk_is_rejected_or_skips_taken_names(service: Service) -> None:
    async with moderator(service) as mona:
        await add(mona, "Mumblecore")
        rows = [{"name": "Kaiju"}, {"name": "MUMBLECORE"}, {"name": "kaiju"}, {"name": "Jidaigeki"}]
        async with nothing_written(service):
            assert_taken(await mona.http.post("/genres/bulk", json=rows), ["body", 1, "name"], ["body", 2, "name"])
        async with watching(service) as watcher:
            bad = [*rows, {"name": ""}]
            answer = await mona.http.post("/genres/bulk?on_error=skip", json=bad)
            assert answer.status_code == 201
            added = answer.json()["added"]
            assert [genre["name"] for genre in added] == ["Kaiju", "Jidaigeki"]
            assert [skipped["index"] for skipped in answer.json()["skipped"]] == [1, 2, 4]
            assert (await watcher.expect("add_bulk", "genres"))["data"]["items"] == added

            ids = [genre["id"] for genre in added]
            answer = await mona.http.request("DELETE", "/genres/bulk", json={"ids": ids})
            assert answer.json() == {"deleted": ids, "not_found": []}
            assert (await watcher.expect("delete_bulk", "genres"))["data"]["ids"] == ids


async def test_an_edit_of_a_missing_genre_takes_no_name(service: Service) -> None:
    async with moderator(service) as mona:
        kept, other = await add(mona, "Telenovela"), await add(mona, "Soap")
        edits = [{"id": 999_999, "name": "Melodrama"}, {"id": other["id"], "name": "Melodrama"}]
        found = await ok(mona.http.patch("/genres/bulk", json=edits))
        assert ([genre["name"] for genre in found["updated"]], found["not_found"]) == (["Melodrama"], [999_999])
        edits = [{"id": 999_999, "name": kept["name"]}]
        assert await ok(mona.http.patch("/genres/bulk", json=edits)) == {"updated": [], "not_found": [999_999]}


async def test_one_bulk_edit_may_swap_names(service: Service) -> None:
    async with moderator(service) as mona:
        first, second, third = [await add(mona, name) for name in ("Cyberpunk", "Steampunk", "Dieselpunk")]
        swap = [{"id": first["id"], "name": "steampunk"}, {"id": second["id"], "name": "cyberpunk"}]
        answer = await mona.http.patch("/genres/bulk", json=swap)
        assert [genre["name"] for genre in answer.json()["updated"]] == ["steampunk", "cyberpunk"]
        assert_taken(await mona.http.post("/genres", json={"name": "Steampunk"}), ["body", "name"])
        async with nothing_written(service):
            kept = [{"id": first["id"], "name": "Dieselpunk"}, {"id": third["id"], "description": "keeps its name"}]
            assert_taken(await mona.http.patch("/genres/bulk", json=kept), ["body", 0, "name"])
            both = [{"id": first["id"], "name": "Solarpunk"}, {"id": second["id"], "name": "solarpunk"}]
            assert_taken(await mona.http.patch("/genres/bulk", json=both), ["body", 1, "name"])
        # When an id is given twice, the last name wins.
        twice = [{"id": first["id"], "name": "Dieselpunk"}, {"id": first["id"], "name": "Biopunk"}]
        assert (await mona.http.patch("/genres/bulk", json=twice)).json()["updated"][0]["name"] == "Biopunk"


async def test_only_one_of_several_concurrent_additions_gets_the_name(service: Service) -> None:
    async with moderator(service) as mona:
        for name in ("Poliziottesco", "Heimatfilm", "Chanchada"):
            answers = await asyncio.gather(*(mona.http.post("/genres", json={"name": name}) for _ in range(12)))
            assert sorted(answer.status_code for answer in answers) == [201] + [409] * 11
            listed = (await mona.http.get("/genres", params={"name": name})).json()
            assert [genre["name"] for genre in listed] == [name]


async def test_only_one_of_two_concurrent_edits_gets_the_name(service: Service) -> None:
    async with moderator(service) as mona:
        first, second = await add(mona, "Mondo"), await add(mona, "Exploitation")
        for _ in range(10):
            answers = await asyncio.gather(
                mona.http.patch(f"/genres/{first['id']}", json={"name": "Sexploitation"}),
                mona.http.patch(f"/genres/{second['id']}", json={"name": "Sexploitation"}),
            )
            assert sorted(answer.status_code for answer in answers) == [200, 409]
            await mona.http.patch(f"/genres/{first['id']}", json={"name": "Mondo"})
            await mona.http.patch(f"/genres/{second['id']}", json={"name": "Exploitation"})


async def test_genres_are_paged_sorted_filtered_and_searched(service: Service) -> None:
    async with moderator(service) as mona, service.anyone() as reader:
        rows = [{"name": f"Sub {letter}", "description": f"about {letter}"} for letter in "badc"]
        await mona.http.post("/genres/bulk", json=rows)
        mine: dict[str, Any] = {"name[prefix]": "sub "}
        found = await reader.get("/genres", params={**mine, "sort": "-name", "limit": 3})
        assert [genre["name"] for genre in found.json()] == ["Sub d", "Sub c", "Sub b"]
        assert found.headers["x-total-count"] == "4"
        assert 'rel="next"' in found.headers["link"]
        named = await reader.get("/genres/names", params={**mine, "sort": "name"})
        assert named.json() == ["Sub a", "Sub b", "Sub c", "Sub d"]
        assert (await reader.get("/genres/count", params=mine)).json() == {"count": 4}
        searched = await ok(reader.get("/genres", params={"q": "ABOUT d sub"}))
        assert [genre["name"] for genre in searched] == ["Sub d"]
        assert (await reader.get("/genres", params={"user_id": 1})).status_code == 422
        assert (await reader.get("/genres", params={"name_key": "sub a"})).status_code == 422


async def test_a_filtered_snapshot_of_genres_continues_live(service: Service) -> None:
    async with moderator(service) as mona:
        kept = await add(mona, "Snap one")
        await add(mona, "Other")
        async with service.watch() as watcher:
            wanted = {"name": {"prefix": "snap"}}
            await subscribed(watcher, topics=["genres"], filter=wanted, snapshot=True, **{"as": "genres"})
            assert await rows_of(watcher, "genres") == [kept]
            await add(mona, "Elsewhere")
            late = await add(mona, "Snap two")
            assert (await watcher.expect("add", "genres"))["data"] == late
            await mona.http.patch(f"/genres/{kept['id']}", json={"name": "No longer"})
            gone = await watcher.expect("delete", "genres")
            assert (gone["data"], gone["reason"]) == ({"id": kept["id"]}, "filter")


async def test_a_repeated_post_of_a_genre_is_carried_out_once(service: Service) -> None:
    async with moderator(service) as mona:
        headers = {"Idempotency-Key": f"genre-{mona.id}"}
        first = await mona.http.post("/genres", json={"name": "Ostern"}, headers=headers)
        again = await mona.http.post("/genres", json={"name": "Ostern"}, headers=headers)
        assert (first.status_code, again.status_code) == (201, 201)
        assert first.content == again.content


@SQLITE_ONLY
async def test_genres_are_written_over_a_socket_with_the_rights_of_its_user(service: Service) -> None:
    async with moderator(service) as mona, service.person() as alice:
        for person, status in ((alice, 403), (mona, 201)):
            async with service.watch() as watcher:
                await watcher.ask({"id": 1, "action": "auth", "token": person.token})
                reply = await over_socket(watcher, "POST", "/genres", {"name": "Over the socket"}, request_id=2)
                assert reply["status"] == status, reply
