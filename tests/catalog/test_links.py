"""Movies and the genres, languages, actors and countries that they show: links, counts, renames and deletions."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from core.errors import ContentTooLarge
from core.identity import Group, Identity
from repository.engine.database import Database
from repository.engine.transaction import MAX_TRANSACTION_BYTES
from repository.generic import links as limits
from repository.generic import writes
from resources.movies import MOVIES
from tests.support.accounts import account, outcome
from tests.support.requests import assert_problem, ok
from tests.support.resources import head, links, locations, moderator, sql, watching
from tests.support.service import Person, Service, Watcher

_numbers = iter(range(1, 10_000))


def fresh(word: str) -> str:
    """Return a name that no other test uses."""
    return f"{word} {next(_numbers)} of links"


async def genre(who: Person, name: str) -> dict[str, Any]:
    found: dict[str, Any] = await ok(who.http.post("/genres", json={"name": name}), 201)
    return found


def written(row: dict[str, Any]) -> dict[str, Any]:
    """Return the members of a row that clients write."""
    read_only = {"id", "user_id", "version", "created_at", "updated_at", "movies_count", "characters_count"}
    return {name: value for name, value in row.items() if name not in read_only}


async def counts(client: httpx.AsyncClient, *paths: str) -> list[int]:
    return [(await ok(client.get(path)))["movies_count"] for path in paths]


async def expect_update(watcher: Watcher, topic: str, changed: str, operation: str = "update") -> Any:
    event = await watcher.expect(operation, topic)
    assert event["changed"] == [changed]
    return event["data"]


async def test_a_movie_shows_the_names_of_its_links_and_each_of_them_counts_it(service: Service) -> None:
    async with service.person() as alice, service.admin() as chief:
        noir, war = await genre(chief, fresh("Noir")), await genre(chief, fresh("War"))
        actor = await ok(chief.http.post("/actors", json={"name": fresh("Alida")}), 201)
        before = await counts(alice.http, "/languages/de", "/languages/en", "/countries/AT")
        async with watching(service) as watcher:
            body: dict[str, Any] = {
                "genres": [war["id"], noir["name"].upper(), f" {war['name']} "],
                "languages": ["DE", "english", "German"],
                "actors": [actor["name"].lower()],
                "country": "AT",
            }
            movie = await alice.add(**body)
            assert movie["genres"] == [war["name"], noir["name"]]
            assert movie["languages"] == ["German", "English"]
            assert (movie["actors"], movie["country"]) == ([actor["name"]], "AT")
            assert (await watcher.expect("add", "movies"))["data"] == movie
            assert (await expect_update(watcher, "countries", "movies_count"))["code"] == "AT"
            await expect_update(watcher, "languages", "movies_count", "update_bulk")
            counted = await expect_update(watcher, "genres", "movies_count", "update_bulk")
            assert counted["items"] == [{**each, "movies_count": 1} for each in (noir, war)]
            assert await expect_update(watcher, "actors", "movies_count") == {**actor, "movies_count": 1}
            after = await counts(alice.http, "/languages/de", "/languages/en", "/countries/AT")
            assert after == [number + 1 for number in before]

            # What GET returned can be sent back: nothing changes, and the only event is that of the title.
            url = f"/movies/{movie['id']}"
            again = await ok(alice.http.put(url, json={**written(movie), "title": "Il terzo uomo"}))
            assert (await watcher.expect("update", "movies"))["changed"] == ["title"]
            edited = await ok(alice.http.patch(url, json={"genres": [noir["name"]], "country": None, "actors": []}))
            assert edited == {**again, **{name: edited[name] for name in ("genres", "country", "actors")}} | {
                "version": 3,
                "updated_at": edited["updated_at"],
            }
            assert sorted((await watcher.expect("update", "movies"))["changed"]) == ["actors", "country", "genres"]
            for topic in ("countries", "genres", "actors"):
                await expect_update(watcher, topic, "movies_count")
            assert (await alice.http.delete(url)).status_code == 204
        paths = ("/languages/de", "/languages/en", "/countries/AT", f"/genres/{noir['id']}", f"/actors/{actor['id']}")
        assert await counts(alice.http, *paths) == [*before, 0, 0]
        assert await sql(service, f"SELECT * FROM movie_genres WHERE movie_id = {movie['id']}") == []


async def test_unknown_names_are_rejected_for_users_and_added_for_staff(service: Service) -> None:
    name, other = fresh("Mumblecore"), fresh("Giallo")
    async with service.person() as alice, moderator(service) as mona:
        wrong: list[tuple[dict[str, Any], list[Any]]] = [
            ({"genres": ["Noir", name]}, ["genres", 1]),
            ({"actors": [name]}, ["actors", 0]),
            ({"genres": [2**62]}, ["genres", 0]),
            ({"languages": ["Klingon"]}, ["languages", 0]),
            ({"languages": [2**62]}, ["languages", 0]),
            ({"country": "QQ"}, ["country"]),
            *(({"genres": [bad]}, ["genres", 0]) for bad in (True, 0, 1.5, 2**63, None, "", "x" * 101, "\0", ["Noir"])),
        ]
        for body, at in wrong:
            answer = await alice.http.post("/movies", json={"title": "A", **body})
            assert_problem(answer, 422, ["body", *at])
            rows = [{"title": "A"}, {"title": "B", **body}]
            answer = await alice.http.post("/movies/bulk", json=rows)
            assert_problem(answer, 422, ["body", 1, *at])
            found = await ok(alice.http.post("/movies/bulk?on_error=skip", json=rows), 201)
            assert [row["title"] for row in found["added"]] == ["A"]
            assert [(each["index"], each["detail"][0]["loc"]) for each in found["skipped"]] == [(1, ["body", 1, *at])]
        answer = await alice.http.post("/movies", json={"title": "A", "genres": [name]})
        only = "only moderators and admins may add new genres"
        assert answer.json()["detail"][0]["msg"] == f'There is no genre "{name}"; {only}'
        movie = await alice.add()
        answer = await alice.http.patch("/movies/bulk", json=[{"id": movie["id"], "genres": [name]}])
        assert_problem(answer, 422, ["body", 0, "genres", 0])

        async with watching(service) as watcher:
            mine = await mona.add(genres=[name, name.upper()], actors=[other])
            assert (mine["genres"], mine["actors"]) == ([name], [other])
            made = (await watcher.expect("add", "genres"))["data"]
            assert (made["name"], made["movies_count"], made["version"]) == (name, 0, 1)
            assert (await watcher.expect("add", "actors"))["data"]["name"] == other
            await watcher.expect("add", "movies")
            assert await expect_update(watcher, "genres", "movies_count") == {**made, "movies_count": 1}
            await watcher.expect("update", "actors")
        assert await ok(alice.http.get(f"/genres/{made['id']}")) == {**made, "movies_count": 1}
        # A new name needs a valid form, and a row that is skipped adds none.
        bad = [{"title": "C", "genres": [f"{other}\n!"]}, {"title": "D", "genres": [other], "actors": [2**62]}]
        assert locations(await mona.http.post("/movies/bulk", json=bad)) == [
            ["body", 0, "genres", 0],
            ["body", 1, "actors", 0],
        ]
        found = await ok(mona.http.post("/movies/bulk?on_error=skip", json=bad), 201)
        assert (found["added"], len(found["skipped"])) == ([], 2)
        assert await ok(mona.http.get("/genres", params={"name": other})) == []
        async with service.admin() as chief:
            entries = await ok(chief.http.get(f"/admin/audit?actor_id={mona.id}"))
        assert ("create", "genres", [made["id"]]) in [
            (each["action"], each["resource"], each["entity_ids"]) for each in entries
        ]


async def test_an_ambiguous_name_needs_an_id_except_for_the_row_that_shows_it(service: Service) -> None:
    name = fresh("John Smith")
    async with service.person() as alice, service.admin() as chief:
        rows = [{"name": name}, {"name": name.upper()}, {"name": name}]
        one, two, three = await chief.add_bulk(rows, "actors")
        answer = await alice.http.post("/movies", json={"title": "A", "actors": [name]})
        assert_problem(answer, 422, ["body", "actors", 0])
        assert f"such as {one['id']} or {three['id']}" in answer.text
        movie = await alice.add(actors=[two["id"], three["id"]])
        assert movie["actors"] == [two["name"], three["name"]]
        url = f"/movies/{movie['id']}"
        await ok(alice.http.put(url, json={**written(movie), "title": "B"}))
        assert (await ok(alice.http.patch(url, json={"actors": [three["name"]]})))["actors"] == [two["name"]]
        paths = [f"/actors/{each['id']}" for each in (one, two, three)]
        assert await counts(alice.http, *paths) == [0, 1, 0]
        # Another actor of the same name is a change, although the movie shows the same.
        movie = await ok(alice.http.patch(url, json={"actors": [three["id"]]}))
        async with watching(service) as watcher:
            changed = await ok(alice.http.patch(url, json={"actors": [one["id"]]}))
            assert (changed["actors"], changed["version"]) == ([name], movie["version"] + 1)
            assert (await watcher.expect("update", "movies"))["changed"] == ["actors"]
            await watcher.expect("update_bulk", "actors")
        assert await counts(alice.http, *paths) == [1, 0, 0]


async def test_renaming_and_deleting_change_the_movies_that_show_it(service: Service) -> None:
    async with service.person() as alice, service.admin() as chief, service.anyone() as client:
        one, two = await genre(chief, fresh("One")), await genre(chief, fresh("Two"))
        movies = await alice.add_bulk([{"title": f"M {n}", "genres": [two["id"], one["id"]]} for n in range(1_050)])
        single = await alice.add(genres=[two["id"]])
        async with watching(service) as watcher:
            names = [{"id": one["id"], "name": two["name"]}, {"id": two["id"], "name": one["name"]}]
            await ok(chief.http.patch("/genres/bulk", json=names))
            assert [each["name"] for each in (await watcher.expect("update_bulk", "genres"))["data"]["items"]] == [
                two["name"],
                one["name"],
            ]
            shown: list[dict[str, Any]] = []
            while len(shown) < 1_051:
                event = await watcher.until(lambda frame: frame.get("topic") == "movies")
                assert (event["operation"], event["changed"]) == ("update_bulk", ["genres"])
                shown += event["data"]["items"]
            assert [row["id"] for row in shown] == [*(row["id"] for row in movies), single["id"]]
            assert {tuple(row["genres"]) for row in shown[:-1]} == {(one["name"], two["name"])}
            assert {row["version"] for row in shown} == {2}
            assert await ok(client.get(f"/movies/{single['id']}")) == shown[-1]

            assert (await chief.http.delete(f"/genres/{two['id']}")).status_code == 204
            events = [await watcher.next() for _ in range(3)]
            assert [(each["operation"], each["topic"]) for each in events] == [
                ("update_bulk", "movies"),
                ("update_bulk", "movies"),
                ("delete", "genres"),
            ]
        found = await ok(client.get(f"/genres/{one['id']}/movies?limit=1000&user_id={alice.id}"))
        assert {tuple(row["genres"]) for row in found} == {(two["name"],)}
        assert (await ok(client.get(f"/movies/{single['id']}")))["genres"] == []
        for method, body in (("PATCH", [{"id": one["id"], "name": fresh("Three")}]), ("DELETE", {"ids": [one["id"]]})):
            await sql(service, f"UPDATE genres SET movies_count = 3001 WHERE id = {one['id']}")
            answer = await chief.http.request(method, "/genres/bulk", json=body)
            await sql(service, f"UPDATE genres SET movies_count = 1050 WHERE id = {one['id']}")
            assert_problem(answer, 409)
            assert "more than 3,000 movies" in answer.json()["detail"]


async def test_a_job_changes_more_bytes_than_one_transaction_may_write(service: Service) -> None:
    async with service.person() as alice, service.admin() as chief:
        one = await genre(chief, fresh("Long"))
        rows = [{"title": f"M {n}", "description": "x" * 10_000, "genres": [one["id"]]} for n in range(850)]
        ids = [row["id"] for _ in range(2) for row in await alice.add_bulk(rows)]
        assert len(rows) * 2 * 10_000 > MAX_TRANSACTION_BYTES
        assert_problem(await chief.http.request("DELETE", "/movies/bulk", json={"ids": ids}), 413)
        name = fresh("Longer")
        answer = await chief.http.patch(f"/genres/{one['id']}", json={"name": name})
        assert answer.status_code == 200
        assert (await chief.job_ended(links(answer)["status"].rpartition("/")[2]))["state"] == "done"
        assert await ok(alice.http.get(f"/movies/count?genre={name}")) == {"count": len(ids)}
        assert (await ok(alice.http.get(f"/movies/{ids[-1]}")))["genres"] == [name]
        await alice.delete_bulk(ids[:850])
        await alice.delete_bulk(ids[850:])


async def test_a_country_keeps_its_code_while_movies_show_it_and_leaves_them_when_deleted(service: Service) -> None:
    async with service.person() as alice, service.admin() as chief:
        movie = await alice.add(country="NR")
        nauru = await ok(alice.http.get("/countries/nr"))
        vanuatu = await ok(alice.http.get("/countries/vu"))
        assert (await chief.http.delete(f"/countries/{vanuatu['id']}")).status_code == 204
        answer = await chief.http.patch(f"/countries/{nauru['id']}", json={"code": "VU"})
        assert_problem(answer, 409)
        assert f"Movies show the code of country {nauru['id']}" in answer.json()["detail"]
        # Its name may change, and so may the code of a country that no movie shows.
        tuvalu = await ok(alice.http.get("/countries/tv"))
        names = [{"id": nauru["id"], "name": "Republic of Nauru"}, {"id": tuvalu["id"], "code": "VU"}]
        await ok(chief.http.patch("/countries/bulk", json=names))
        listed = await ok(alice.http.get("/countries/nr/movies"))
        assert listed == [movie] == await ok(alice.http.get(f"/countries/{nauru['id']}/movies"))
        async with watching(service) as watcher:
            assert (await chief.http.delete(f"/countries/{nauru['id']}")).status_code == 204
            changed = await expect_update(watcher, "movies", "country")
            assert (changed["country"], changed["version"]) == (None, 2)
            await watcher.expect("delete", "countries")
        language = await ok(chief.http.post("/languages", json={"code": None, "name": fresh("Cantonese")}), 201)
        assert (await alice.add(languages=[language["name"]]))["languages"] == [language["name"]]
        await ok(chief.http.put(f"/languages/{language['id']}", json=written(language)))


async def test_the_movies_of_a_row_are_a_list_like_any_other(service: Service) -> None:
    async with service.person() as alice, service.admin() as chief:
        one = await genre(chief, fresh("Heist"))
        rows = [
            {"title": f"Loot {n}", "rating": 10 + n // 2, "genres": [one["id"]] if n != 3 else []} for n in range(8)
        ]
        rows[5] |= {"title": "The loot", "country": "IO"}
        rows[6] |= {"country": "IO"}
        movies = await alice.add_bulk(rows)
        shown = [row for row in movies if row["genres"]]
        path = f"/genres/{one['id']}/movies"
        for query, expected in (
            ("", shown),
            ("sort=-rating", sorted(shown, key=lambda row: (-row["rating"], row["id"]))),
            ("q=loot&rating[gte]=12&sort=title", [shown[3], *shown[5:], shown[4]]),
            (f"after={movies[2]['id']}", shown[3:]),
            (f"genre={quote(one['name'])}", shown),
            ("q=lóot", [*shown[:4], *shown[5:], shown[4]]),
            ("q=loot&rating[gte]=12&sort=id", shown[3:]),
            ("q=the", [shown[4]]),
        ):
            answer = await alice.http.get(f"{path}?limit=1000&{query}")
            assert answer.json() == expected, query
            assert answer.headers["stream-position"].endswith(f":{await head(service)}")
            url, walked = f"{path}?limit=2&{query}", []
            while url:
                answer = await alice.http.get(url)
                walked += answer.json()
                url = links(answer).get("next", "")
            assert walked == expected, query
            assert "after" in query or answer.headers["x-total-count"] == str(len(expected)), query
        found = await ok(alice.http.get(f"/countries/io/movies?q=loot&user_id={alice.id}"))
        assert found == [movies[6], movies[5]]
        assert (await alice.http.get(f"{path}?limit=0")).headers["x-total-count"] == str(len(shown))
        assert await ok(alice.http.get(f"{path}?fields=title&limit=1")) == [{"title": "Loot 0"}]
        assert_problem(await alice.http.get(f"/genres/{2**62}/movies"), 404)
        assert_problem(await alice.http.get("/countries/xx/movies"), 404)
        assert_problem(await alice.http.get(f"{path}?genres=x"), 422, ["query", "genres"])


async def test_a_job_adds_the_genres_of_its_movies_and_finds_renamed_languages(
    new_service: Callable[..., Service],
) -> None:
    with new_service().running() as service:
        async with service.person() as alice, service.admin() as chief:
            german = await ok(chief.http.get("/languages/de"))
            await ok(chief.http.patch(f"/languages/{german['id']}", json={"name": "Standard German"}))
            yoruba = await ok(chief.http.get("/languages/yo"))
            assert (await chief.http.delete(f"/languages/{yoruba['id']}")).status_code == 204
            assert (await ok(chief.http.post("/genres", json={"name": "WAR"}), 201))["id"] == 1
            async with watching(service) as watcher:
                job = await alice.generated("movies", 300, "?seed=1&batch_size=100")
                added = await watcher.until(lambda frame: frame.get("operation") == "add_bulk")
                assert (added["topic"], added["data"]["job_id"]) == ("genres", job["id"])
            movies = await ok(alice.http.get("/movies?limit=1000"))
            for path, column, label in (
                ("/genres", "genres", "name"),
                ("/languages", "languages", "name"),
                ("/countries", "country", "code"),
            ):
                listed = await ok(alice.http.get(f"{path}?limit=1000&movies_count[gt]=0"))
                values = [row[column] if isinstance(row[column], list) else [row[column]] for row in movies]
                assert {row[label]: row["movies_count"] for row in listed} == Counter(chain.from_iterable(values))
            found = {name for row in movies for name in (*row["languages"], *row["genres"])}
            assert {"Standard German", "WAR"} <= found
            assert not {"German", "Yoruba", "War"} & found
            for name in ("genres", "languages"):
                ((number,),) = await sql(service, f"SELECT COUNT(*) FROM movie_{name}")
                assert number == sum(len(row[name]) for row in movies)


async def test_the_links_of_one_request_are_bounded(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    chief = Identity(await account(database, "chief", Group.ADMIN), Group.ADMIN, time.time() + 600, "", "chief")
    rows = [{**MOVIES.defaults, "title": "M", "genres": ["Noir", "War"], "country": "AT"} for _ in range(2)]

    async def added() -> Any:
        return await outcome(database.write(lambda tx: writes.add_bulk(tx, MOVIES, chief, rows, skip_conflicts=False)))

    monkeypatch.setattr(limits, "MAX_LINKS_PER_REQUEST", 4)
    assert len((await added()).encoded) == 2
    monkeypatch.setattr(limits, "MAX_LINKS_PER_REQUEST", 3)
    assert await added() is ContentTooLarge
    assert await outcome(database.write(lambda tx: writes.remove_bulk(tx, MOVIES, chief, [1, 2]))) is ContentTooLarge
    assert (await database.write(lambda tx: writes.remove_bulk(tx, MOVIES, chief, [1]))).done == [1]
