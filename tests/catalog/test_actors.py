"""Actors may share a name, are edited by moderators and admins, and can be read and watched by everyone."""

from __future__ import annotations

from typing import Any

from tests.support.backends import SQLITE_ONLY
from tests.support.requests import assert_problem, ok, values_by_field
from tests.support.resources import moderator, nothing_written, watching
from tests.support.service import PASSWORD, Person, Service
from tests.support.sockets import rows_of, subscribed

VALLI = {"name": "Alida Valli", "birth_date": "1921-05-31", "country": "IT", "biography": "Born in Pola."}


async def add(person: Person, **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = await ok(person.http.post("/actors", json=VALLI | fields), 201)
    return found


async def test_watchers_see_a_moderator_add_edit_and_delete_an_actor(service: Service) -> None:
    async with moderator(service) as mona, service.anyone() as reader, watching(service) as watcher:
        answer = await mona.http.post("/actors", json=VALLI)
        actor = answer.json()
        path = f"/actors/{actor['id']}"
        assert (answer.status_code, answer.headers["location"]) == (201, path)
        times = dict.fromkeys(("created_at", "updated_at"), actor["created_at"])
        counts = {"movies_count": 0, "characters_count": 0}
        assert actor == {"id": actor["id"], **VALLI, **counts, "version": 1, **times}
        assert list(actor)[1:5] == list(VALLI)
        assert (await watcher.expect("add", "actors"))["data"] == actor
        read = await reader.get(path)
        assert read.json() == actor
        unchanged = await reader.get(path, headers={"If-None-Match": read.headers["etag"]})
        assert unchanged.status_code == 304

        changed = await ok(mona.http.patch(path, json={"birth_date": None}, headers={"If-Match": read.headers["etag"]}))
        event = await watcher.expect("update", "actors")
        assert (event["data"], event["changed"]) == (changed, ["birth_date"])
        assert (changed["birth_date"], changed["version"]) == (None, 2)
        assert (await mona.http.delete(path, headers={"If-Match": read.headers["etag"]})).status_code == 412

        replaced = await ok(mona.http.put(path, json={"name": " Valli "}))
        assert [replaced[name] for name in VALLI] == ["Valli", None, None, None]
        assert (await watcher.expect("update", "actors"))["data"] == replaced
        assert (await mona.http.delete(path)).status_code == 204
        assert (await watcher.expect("delete", "actors"))["data"] == {"id": actor["id"]}
        assert (await reader.get(path)).status_code == 404


async def test_actors_in_bulk_may_have_the_same_name(service: Service) -> None:
    async with moderator(service) as mona, watching(service) as watcher:
        added = (await ok(mona.http.post("/actors/bulk", json=[VALLI, VALLI]), 201))["added"]
        assert (await watcher.expect("add_bulk", "actors"))["data"]["items"] == added
        first, second = [actor["id"] for actor in added]
        edits = [{"id": first, "country": "HR"}, {"id": second, "birth_date": "1921-06-01"}]
        updated = (await ok(mona.http.patch("/actors/bulk", json=edits)))["updated"]
        assert (await watcher.expect("update_bulk", "actors"))["data"]["items"] == updated
        assert [(actor["country"], actor["birth_date"]) for actor in updated] == [
            ("HR", "1921-05-31"),
            ("IT", "1921-06-01"),
        ]
        deleted = await ok(mona.http.delete(f"/actors/bulk/{first}/{second}"))
        assert deleted == {"deleted": [first, second], "not_found": []}


INVALID: dict[str, list[Any]] = {
    "name": ["", " ", "a\nb", None, 5, "x" * 101],
    "birth_date": ["1921-02-29", "31.05.1921", "1921-05-31T00:00:00Z", 1921],
    "country": ["", "it", "ITA", "XX", "Italy", 5],
    "biography": ["x" * 10_001, "\0", 5],
    "user_id": [1],
}


@SQLITE_ONLY
async def test_an_invalid_field_is_named(service: Service) -> None:
    async with moderator(service) as mona:
        path = f"/actors/{(await add(mona))['id']}"
        async with nothing_written(service):
            for field, value in values_by_field(INVALID):
                for method, where in (("POST", "/actors"), ("PATCH", path)):
                    body = (VALLI if method == "POST" else {}) | {field: value}
                    assert_problem(await mona.http.request(method, where, json=body), 422, ["body", field])
            answer = await mona.http.post("/actors", json=VALLI | {"country": "it"})
            message = "Expected an ISO 3166-1 alpha-2 code in upper case, such as AT"
            assert answer.json()["detail"][0]["msg"] == message


async def test_actors_are_filtered_sorted_searched_and_watched(service: Service) -> None:
    async with moderator(service) as mona, service.anyone() as reader:
        for name, born, country in (
            ("List b", "1900-01-01", "AT"),
            ("List a", "2000-01-01", "AT"),
            ("List c", None, "FR"),
        ):
            await add(mona, name=name, birth_date=born, country=country, biography=f"Known as {name[-1]}.")
        mine: dict[str, Any] = {"name[prefix]": "list "}
        queries: list[tuple[dict[str, Any], str]] = [
            ({"sort": "birth_date"}, "bac"),
            ({"sort": "-name", "limit": 2}, "cb"),
            ({"country": "AT", "birth_date[lt]": "1950-01-01"}, "b"),
            ({"q": "KNOWN c."}, "c"),
        ]
        for query, names in queries:
            found = await ok(reader.get("/actors/names", params=mine | query))
            assert found == [f"List {letter}" for letter in names], query
        assert await ok(reader.get("/actors/count", params=mine)) == {"count": 3}

        async with service.watch() as watcher:
            wanted = {"name": {"prefix": "list "}, "birth_date": {"gte": "1950-01-01"}}
            await subscribed(watcher, topics=["actors"], filter=wanted, snapshot=True, **{"as": "young"})
            (young,) = await rows_of(watcher, "actors")
            assert young["name"] == "List a"
            await mona.http.patch(f"/actors/{young['id']}", json={"birth_date": "1949-12-31"})
            gone = await watcher.expect("delete", "actors")
            assert (gone["data"], gone["reason"]) == ({"id": young["id"]}, "filter")


async def test_actors_outlive_the_account_that_added_them_and_their_country(service: Service) -> None:
    async with service.admin() as chief, moderator(service) as mona:
        actor = await add(mona, country="TF")
        trail = await ok(chief.http.get(f"/admin/audit?actor_id={mona.id}"))
        assert [(entry["action"], entry["user_id"], entry["entity_ids"]) for entry in trail] == [
            ("create", None, [actor["id"]])
        ]
        body = {"current_password": PASSWORD}
        assert (await mona.http.request("DELETE", "/users/me", json=body)).status_code == 204
        country = await ok(chief.http.get("/countries/TF"))
        assert (await chief.http.delete(f"/countries/{country['id']}")).status_code == 204
        assert await ok(chief.http.get(f"/actors/{actor['id']}")) == actor
        kept = await ok(chief.http.put(f"/actors/{actor['id']}", json={name: actor[name] for name in VALLI}))
        assert kept == actor
        await ok(chief.http.post("/countries", json={"code": "TF", "name": country["name"]}), 201)
