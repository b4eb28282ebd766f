"""The parameter `fields`: lists and single reads return only the members that it names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from routes.table import OPERATIONS
from tests.support.backends import SQLITE_ONLY
from tests.support.requests import assert_problem, change_group, ok, over_socket
from tests.support.resources import BOTH, ResourceCase, links
from tests.support.service import Service


def only(names: str, row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in names.split(",")}


@BOTH
async def test_lists_and_single_reads_return_only_the_named_members(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        row = await alice.add(kind.name, **kind.full)
        one = f"{kind.path}/{row['id']}"
        for wanted in (kind.label, "id", f"{kind.label},description,created_at", "version,updated_at", ",".join(row)):
            expected = list(only(wanted, row).items())
            backwards = ",".join(reversed(wanted.split(",")))
            for fields in (wanted, backwards):  # the members have the order of the entity
                found = await ok(alice.http.get(f"{one}?fields={fields}"))
                assert list(found.items()) == expected
                for path in (
                    f"{kind.path}/user",
                    f"/users/{alice.id}{kind.path}",
                    f"{kind.path}/username/{alice.name}",
                ):
                    (found,) = await ok(alice.http.get(f"{path}?fields={fields}"))
                    assert list(found.items()) == expected, path


async def test_every_kind_of_list_and_entity_takes_fields(service: Service) -> None:
    async with service.admin() as chief, service.person() as alice:
        await change_group(chief, alice, "moderator")  # appears in the audit trail
        genre = await ok(chief.http.post("/genres", json={"name": f"Fields {service.port}"}), 201)
        job = await chief.generate("movies", 1)
        actor = await ok(chief.http.post("/actors", json={"name": "An actor"}), 201)
        ids = {"genres": genre["id"], "actors": actor["id"]}
        for name in ("countries", "languages"):  # other tests delete some of them
            ids[name] = (await ok(chief.http.get(f"/{name}?limit=1")))[0]["id"]
        ids |= {"jobs": job["id"], "accounts": alice.id}
        ids |= {name: (await alice.add(name))["id"] for name in ("movies", "characters")}
        text = {"text": "Splendid"}
        comment = await ok(alice.http.post(f"/movies/{ids['movies']}/comments", json=text), 201)
        rating = await ok(chief.http.post(f"/movies/{ids['movies']}/ratings", json={"score": 9}), 201)
        entry = await ok(chief.http.post("/watchlist", json={"movie_id": ids["movies"]}), 201)
        ids |= {"comments": comment["id"], "ratings": rating["id"], "watchlist": entry["id"]}
        taking = [each for each in OPERATIONS if each.members and each.media_type == "application/json"]
        tags = {each.path: "movies" if each.path.startswith("/movies/{id}") else each.tag for each in taking}
        paths = {each.path.format(id=ids[tags[each.path]], user_id=alice.id, username=alice.name) for each in taking}
        assert {"/jobs", "/users", "/users/nonAdmin", "/users/me", "/auth/sessions", "/admin/audit"} <= paths
        for path in paths:
            found = await ok(chief.http.get(f"{path}?fields=created_at"))
            for row in found if isinstance(found, list) else [found]:
                assert row.keys() == {"created_at"}, path


async def test_fields_work_with_filters_search_sort_and_cursors(service: Service) -> None:
    """Following `Link` returns the same members on every page, although the cursor needs others."""
    async with service.person() as alice:
        rows = await alice.add_bulk([{"title": f"Field {n}", "rating": 50 + n // 2, "country": "AT"} for n in range(5)])
        mine = f"user_id={alice.id}&q=field&country=AT&rating[gte]=50"
        for start, expected in (
            (f"/movies?{mine}&fields=title&sort=-rating,title&limit=2", [4, 2, 3, 0, 1]),
            (f"/movies?{mine}&fields=title&limit=2", [0, 1, 2, 3, 4]),
            (f"/movies?{mine}&fields=title&limit=2&after=0", [0, 1, 2, 3, 4]),
        ):
            url, seen = start, []
            while url:
                answer = await alice.http.get(url)
                seen += await ok(alice.http.get(url))
                url = links(answer).get("next", "")
            assert seen == [{"title": rows[n]["title"]} for n in expected], start


async def test_included_rows_are_added_to_the_named_members(service: Service) -> None:
    async with service.person() as alice:
        movie = await alice.add()
        harry = await alice.add("characters", movie_id=movie["id"])
        found = await ok(alice.http.get(f"/movies/{movie['id']}?include=characters&fields=title"))
        assert found == {"title": movie["title"], "characters": [harry]}


@pytest.mark.parametrize("fields", ["", "planet", "title,", "title,title", "Title", "title, rating", "characters", "*"])
@SQLITE_ONLY
async def test_invalid_fields_are_rejected_with_the_known_names(service: Service, fields: str) -> None:
    async with service.person() as alice:
        movie = await alice.add()
        for path in ("/movies", "/movies/user", f"/movies/{movie['id']}"):
            answer = await alice.http.get(path, params={"fields": fields, "include": "x"})
            assert answer.status_code == 422
            problem = next(each for each in answer.json()["detail"] if each["loc"] == ["query", "fields"])
            assert f"one or more of {', '.join(movie)}," in problem["msg"]


@SQLITE_ONLY
async def test_fields_are_named_once_and_only_where_there_are_entities(service: Service) -> None:
    async with service.person() as alice:
        assert_problem(await alice.http.get("/movies?fields=id&fields=title"), 422, ["query", "fields"])
        for path in ("/movies/count", "/movies/names", "/healthz"):
            refused = await alice.http.get(f"{path}?fields=title")
            assert_problem(refused, 422, ["query", "fields"])
        assert refused.json()["detail"][0]["msg"] == "Unknown parameter; expected no parameters"


async def test_entity_tags_belong_to_the_named_members(service: Service) -> None:
    async with service.person() as alice:
        one = f"/movies/{(await alice.add(rating=50))['id']}"
        queries = ("", "?fields=id", "?fields=title", "?fields=title,rating", "?fields=version")
        tags = {query: (await alice.http.get(one + query)).headers["etag"] for query in queries}
        assert len(set(tags.values())) == len(tags)
        for query in queries:
            for known, tag in tags.items():
                answer = await alice.http.get(one + query, headers={"If-None-Match": tag})
                assert answer.status_code == (304 if query == known else 200), (query, known)
        # `If-Match` compares the version, so a tag of some members protects the whole entity.
        guard = {"If-Match": tags["?fields=title"]}
        assert (await alice.http.patch(one, json={"rating": 60}, headers=guard)).status_code == 200
        assert (await alice.http.patch(one, json={"rating": 70}, headers=guard)).status_code == 412


async def test_fields_work_over_a_websocket(service: Service) -> None:
    async with service.person() as alice, service.watch() as watcher:
        movie = await alice.add()
        for path, body in (
            (f"/movies/{movie['id']}?fields=title", {"title": movie["title"]}),
            (f"/movies?user_id={alice.id}&fields=id,title", [only("id,title", movie)]),
        ):
            reply = await over_socket(watcher, "GET", path)
            assert (reply["status"], reply["body"]) == (200, body)


async def test_users_see_no_members_that_only_admins_see(service: Service) -> None:
    async with service.person() as alice, service.admin() as chief:
        one = f"/users/{chief.id}"
        for path in (one, "/users"):
            answer = await alice.http.get(f"{path}?fields=username,email,version")
            assert_problem(answer, 403)
            assert answer.json()["detail"].endswith("email, version")
        assert await ok(alice.http.get(f"{one}?fields=username")) == {"username": chief.name}
        assert await ok(alice.http.get(f"/users?id={chief.id}&fields=username")) == [{"username": chief.name}]
        assert (await ok(chief.http.get(f"{one}?fields=group,id"))) == {"id": chief.id, "group": "admin"}
        assert await ok(alice.http.get("/users/me?fields=id,email")) == {"id": alice.id, "email": None}


async def test_unnamed_members_are_not_read(service: Service) -> None:
    """Long texts that `fields` leaves out do not count towards the size of a page."""
    async with service.person() as alice:
        rows = [{"name": f"n{n}", "description": "é" * 10_000} for n in range(425)]
        await ok(alice.http.post("/characters/bulk", json=rows), 201)
        mine = f"/characters?user_id={alice.id}&limit=1000"
        assert_problem(await alice.http.get(f"{mine}&fields=description"), 422, ["query", "limit"])
        assert await ok(alice.http.get(f"{mine}&fields=name")) == [{"name": row["name"]} for row in rows]
