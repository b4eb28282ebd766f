"""Lists: paging, sorting, filters and search, the same on both databases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import pytest

from tests.support.backends import SQLITE_ONLY
from tests.support.requests import assert_problem, ok, over_socket
from tests.support.resources import BOTH, CHARACTERS, MOVIES, ResourceCase, links, sql
from tests.support.service import Person, Service

SHELF: dict[str, list[dict[str, Any]]] = {
    "movies": [
        {"title": "Été", "rating": 50, "release_date": "1990-01-01", "genres": ["Drama"], "languages": ["French"]},
        {"title": "été indien", "rating": 70, "release_date": "1999-12-31", "genres": ["Drama", "Comedy"]},
        {"title": "Zorro", "rating": None, "description": "Masked, and a fox", "languages": ["Spanish", "English"]},
        {"title": "amélie", "rating": 50, "release_date": None, "genres": ["Comedy"], "status": "released"},
        {"title": "ΟΔΥΣΣΕΥΣ", "rating": 90, "release_date": "2001-02-03", "country": "GR", "genres": ["Western"]},
        {"title": "Amélie 2", "rating": None, "release_date": "2001-02-03", "budget": 10, "genres": ["a,b"]},
    ],
}
SHELF["characters"] = [
    {"name": row["title"]} | {key: row[key] for key in row if key == "description"} for row in SHELF["movies"]
]
ALL = [0, 1, 2, 3, 4, 5]


class Shelf:
    """The rows of one user. `get` lists only these rows and returns their indices in `rows`."""

    def __init__(self, person: Person, kind: ResourceCase, rows: list[dict[str, Any]]) -> None:
        self.person, self.kind, self.rows = person, kind, rows
        self.numbers = {row["id"]: n for n, row in enumerate(rows)}

    async def get(self, query: str = "") -> list[int]:
        answer = await self.person.http.get(f"{self.kind.path}?user_id={self.person.id}&{query}")
        assert answer.status_code == 200, answer.text
        found = [self.numbers[row["id"]] for row in answer.json()]
        # The route that counts the rows agrees with the list.
        counted = await self.person.http.get(f"{self.kind.path}/count?user_id={self.person.id}&{without_page(query)}")
        assert counted.json() == {"count": int(answer.headers["x-total-count"])}, query
        return found


def without_page(query: str) -> str:
    kept = (part for part in query.split("&") if part.split("=")[0] not in ("limit", "offset", "skip", "after", "sort"))
    return "&".join(kept)


@asynccontextmanager
async def shelf_of(service: Service, kind: ResourceCase) -> AsyncIterator[Shelf]:
    async with service.person() as alice:
        rows = (await ok(alice.http.post(f"{kind.path}/bulk", json=SHELF[kind.name]), 201))["added"]
        yield Shelf(alice, kind, rows)


@pytest.fixture(params=[MOVIES, CHARACTERS], ids=lambda kind: kind.name)
async def shelf(request: pytest.FixtureRequest, service: Service) -> AsyncIterator[Shelf]:
    async with shelf_of(service, request.param) as found:
        yield found


@pytest.fixture
async def movies(service: Service) -> AsyncIterator[Shelf]:
    async with shelf_of(service, MOVIES) as found:
        yield found


# --- pages


PAGES = {
    "limit=2": [0, 1],
    "limit=2&offset=3": [3, 4],
    "limit=2&skip=3": [3, 4],
    "limit=2&skip=3&offset=1": [1, 2],
    "limit=0": [],
    "limit=1000": ALL,
    "offset=6": [],
    f"offset={2**63 - 1}": [],
    "offset=0&limit=1": [0],
}


async def test_a_page_is_part_of_the_list_in_the_order_of_ids(shelf: Shelf) -> None:
    for query, wanted in PAGES.items():
        rows = await shelf.person.http.get(f"{shelf.kind.path}/user?{query}")
        assert rows.json() == [shelf.rows[n] for n in wanted], query
        names = await shelf.person.http.get(f"{shelf.kind.path}/names?user_id={shelf.person.id}&{query}")
        assert names.json() == [shelf.rows[n][shelf.kind.label] for n in wanted]
        assert rows.headers["x-total-count"] == names.headers["x-total-count"] == "6"


@pytest.mark.parametrize("prefix", ["", "/api/v1"])
@pytest.mark.parametrize("start", ["limit=2", "limit=4&sort=-id", "limit=1&after=0", "limit=2&after=0", "limit=6"])
async def test_following_next_visits_every_row_once(shelf: Shelf, prefix: str, start: str) -> None:
    url: str | None = f"{prefix}{shelf.kind.path}?user_id[in]={shelf.person.id}&{start}"
    seen: list[int] = []
    for _ in range(20):
        assert url is not None
        assert url.startswith(f"{prefix}{shelf.kind.path}?")
        answer = await shelf.person.http.get(url)
        seen += [shelf.numbers[row["id"]] for row in answer.json()]
        url = links(answer).get("next")
        if url is None:
            break
    assert seen == ([5, 4, 3, 2, 1, 0] if "sort" in start else [0, 1, 2, 3, 4, 5])


async def test_links_lead_to_the_first_and_last_page(shelf: Shelf) -> None:
    base = f"{shelf.kind.path}?user_id={shelf.person.id}&limit=2"
    found = links(await shelf.person.http.get(f"{base}&offset=2"))
    assert set(found) == {"first", "prev", "next", "last"}
    for relation, wanted in (("first", [0, 1]), ("prev", [0, 1]), ("next", [4, 5]), ("last", [4, 5])):
        answer = await shelf.person.http.get(found[relation])
        assert [shelf.numbers[row["id"]] for row in answer.json()] == wanted, relation
    assert "prev" not in links(await shelf.person.http.get(base))
    assert "next" not in links(await shelf.person.http.get(f"{base}&offset=4"))
    assert links(await shelf.person.http.get(f"{shelf.kind.path}?limit=0")) == {}


async def test_paging_by_id_skips_no_row_while_others_are_deleted(shelf: Shelf) -> None:
    first = await shelf.person.http.get(f"{shelf.kind.path}?user_id={shelf.person.id}&limit=2&after=0")
    for n in (0, 1):
        await shelf.person.http.delete(f"{shelf.kind.path}/{shelf.rows[n]['id']}")
    second = await shelf.person.http.get(links(first)["next"])
    assert [shelf.numbers[row["id"]] for row in second.json()] == [2, 3]


# --- order


SORTS = {
    "title": [5, 2, 3, 0, 1, 4],
    "-title": [4, 1, 0, 3, 2, 5],
    "rating": [0, 3, 1, 4, 2, 5],
    "-rating": [4, 1, 0, 3, 2, 5],
    "-rating,-id": [4, 1, 3, 0, 5, 2],
    "-rating&sort=-id": [4, 1, 3, 0, 5, 2],
    "&sort=-rating&sort=": [4, 1, 0, 3, 2, 5],
    "rating,-title": [0, 3, 1, 4, 2, 5],
    "release_date,-rating": [0, 1, 4, 5, 3, 2],
    "-release_date,id": [4, 5, 1, 0, 2, 3],
    "-id": [5, 4, 3, 2, 1, 0],
    "created_at,-id": [5, 4, 3, 2, 1, 0],
    "budget": [5, 0, 1, 2, 3, 4],
    "user_id,version,characters_count": ALL,
}


async def test_rows_are_sorted_and_missing_values_come_last(movies: Shelf) -> None:
    for sort, wanted in SORTS.items():
        assert await movies.get(f"sort={sort}") == wanted, sort


async def test_pages_of_equal_rows_do_not_overlap(shelf: Shelf) -> None:
    assert await shelf.get("sort=user_id&limit=3") == [0, 1, 2]
    assert await shelf.get("sort=user_id&limit=3&offset=3") == [3, 4, 5]


# --- filters

FILTERS = {
    "rating=50": [0, 3],
    "rating[eq]=50": [0, 3],
    "rating[in]=70,90": [1, 4],
    "rating[in]=1": [],
    "rating[ne]=50": [1, 2, 4, 5],  # a missing rating is not equal to 50
    "rating[gt]=50": [1, 4],
    "rating[gte]=70": [1, 4],
    "rating[gte]=-5": [0, 1, 3, 4],
    "rating[lt]=70": [0, 3],
    "rating[lte]=70": [0, 1, 3],
    "rating[gt]=50&rating[lt]=90": [1],
    "release_date=2001-02-03": [4, 5],
    "release_date[ne]=2001-02-03": [0, 1, 2, 3],
    "release_date[gte]=1999-12-31": [1, 4, 5],
    "release_date[lt]=1999-12-31": [0],
    "release_date[in]=1990-01-01,1999-12-31": [0, 1],
    "genre=Drama": [0, 1],
    "genre=Dram": [],
    "genre[ne]=Drama": [2, 3, 4, 5],
    "genre=drama": [],
    "genre[in]=Comedy,Western": [1, 3, 4],
    "genre=a,b": [5],
    "genre=Drama&genre=Comedy": [1],
    "language=French": [0],
    "language[in]=French,English": [0, 2],
    "country=GR": [4],
    "country[ne]=GR": [0, 1, 2, 3, 5],
    "status=released": [3],
    "budget[lte]=10": [5],
    "duration_minutes[gt]=0": [],
    "characters_count=0&version=1": ALL,
}


async def test_movies_are_filtered(movies: Shelf) -> None:
    for query, wanted in FILTERS.items():
        assert await movies.get(query) == wanted, query


TEXT_FILTERS = {
    "{}=Zorro": [2],
    "{}=zorro": [],
    "{}=": [],
    "{}[in]=Zorro,Été": [0, 2],
    "{}[ne]=Zorro": [0, 1, 3, 4, 5],
    # Text is ordered by code point: uppercase, lowercase, accented and then Greek letters.
    "{}[gt]=Zorro": [0, 1, 3, 4],
    "{}[lt]=a": [2, 5],
    "{}[prefix]=été": [0, 1],
    "{}[prefix]=ÉTÉ": [0, 1],
    "{}[prefix]=tÉ": [],
    "{}[prefix]=ΟΔΥΣ": [4],
    # Searches ignore case, but not accents.
    "{}[contains]=TÉ": [0, 1],
    "{}[contains]=MÉLI": [3, 5],
    "{}[contains]=e": [1, 3, 5],
    "{}[contains]=οδυσσευς": [4],
    "{}[contains]=ΥΣ": [4],
    "description[contains]=FOX": [2],
    "description[ne]=x": ALL,
    "q=amélie": [3, 5],
    "q=2 AMÉLIE": [5],
    "q=zorro fox": [2],
    "q=zorro wolf": [],
    "q=%20": ALL,
    "q=ΟΔΥΣ": [4],
}


async def test_text_is_compared_with_the_documented_case_rules(shelf: Shelf) -> None:
    for query, wanted in TEXT_FILTERS.items():
        name, _, value = query.format(shelf.kind.label).partition("=")
        assert await shelf.get(f"{name}={quote(value, safe='%,')}") == wanted, query


async def test_a_value_with_a_comma_or_a_quote_can_be_listed(service: Service) -> None:
    names = ["The Good, the Bad and the Ugly", "Alien", '"Wow", he said', '5" nails', "Good"]
    wanted = quote('"The Good, the Bad and the Ugly",Alien,"""Wow"", he said",5" nails')
    service.add_genres(*names)
    async with service.person() as alice, service.watch(additional_headers=alice.bearer) as watcher:
        for name in names:
            await alice.add(title=name, genres=[name])
        for field in ("title", "genre"):
            query = f"{field}[in]={wanted}&user_id={alice.id}"
            rows = await ok(alice.http.get(f"/movies?{query}"))
            assert [row["title"] for row in rows] == names[:4]
            assert (await over_socket(watcher, "GET", f"/movies?{query}"))["body"] == rows
            assert (await ok(alice.http.get(f"/movies/count?{query}"))) == {"count": 4}
        answer = await alice.http.get(f"/movies?{query}&limit=2")
        assert [row["title"] for row in await ok(alice.http.get(links(answer)["next"]))] == names[2:4]


async def test_times_are_compared_as_times(shelf: Shelf) -> None:
    moment = shelf.rows[0]["created_at"]
    assert await shelf.get(f"created_at={moment}") == ALL
    assert await shelf.get(f"created_at[gt]={moment}") == []
    assert await shelf.get(f"created_at[gte]={moment.replace('Z', '%2B00:00')}") == ALL
    assert await shelf.get(f"created_at[lt]={moment.replace('Z', '-01:00')}") == ALL
    assert await shelf.get("updated_at[gt]=0001-01-01T00:00:00Z&updated_at[lt]=9999-12-31T23:59:59Z") == ALL
    assert await shelf.get(f"created_at[in]={moment},2000-01-01T00:00:00Z") == ALL


async def test_ids_are_filtered(shelf: Shelf) -> None:
    ids = [row["id"] for row in shelf.rows]
    assert await shelf.get(f"id={ids[2]}") == [2]
    assert await shelf.get(f"id[in]={ids[4]},{ids[1]},{10**9}") == [1, 4]
    assert await shelf.get(f"id[gt]={ids[3]}") == [4, 5]


async def test_characters_are_filtered_by_their_movie(service: Service) -> None:
    async with service.person() as alice:
        movie = await alice.add()
        harry = await alice.add("characters", movie_id=movie["id"])
        await alice.add("characters")
        found = (await alice.http.get(f"/characters?movie_id={movie['id']}")).json()
        assert found == [harry]
        others = f"/characters/count?user_id={alice.id}&movie_id[ne]={movie['id']}"
        assert (await alice.http.get(others)).json() == {"count": 1}


# --- owners


@BOTH
async def test_rows_are_listed_by_owner(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice, service.person() as bob, service.anyone() as anonymous:
        mine = [await alice.add(kind.name) for _ in range(2)]
        await bob.add(kind.name)
        for client, path in (
            (alice.http, f"{kind.path}/user"),
            (anonymous, f"{kind.path}/username/{alice.name}"),
            (anonymous, f"{kind.path}/username/{alice.name.upper()}"),
            (anonymous, f"/users/{alice.id}{kind.path}"),
            (anonymous, f"/api/v1/users/{alice.id}{kind.path}/"),
        ):
            answer = await client.get(path)
            assert answer.json() == mine, path
            assert answer.headers["x-total-count"] == "2"
            assert (await client.get(f"{path}?sort=-id&limit=1")).json() == mine[1:]
        for path in (f"{kind.path}/username/nobody-of-this-name", f"/users/{10**9}{kind.path}"):
            answer = await anonymous.get(path)
            assert answer.status_code == 404
            assert isinstance(answer.json()["detail"], str)


@BOTH
@pytest.mark.parametrize("name", ["日本語の人", "Renée", 'a">;b=<c', "100%25", "semi;colon?#"])
@SQLITE_ONLY
async def test_links_may_contain_any_user_name(service: Service, kind: ResourceCase, name: str) -> None:
    async with service.person(f"{name}{kind.name}{service.port}") as person:
        mine = [await person.add(kind.name) for _ in range(2)]
        answer = await person.http.get(f"{kind.path}/username/{quote(person.name)}?limit=1")
        assert answer.json() == mine[:1]
        assert (await person.http.get(links(answer)["next"])).json() == mine[1:]


@BOTH
async def test_a_list_holds_whole_bulks_while_others_write(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:

        async def write() -> None:
            for _ in range(20):
                assert (await alice.http.post(f"{kind.path}/bulk", json=[kind.fields("x")] * 5)).status_code == 201

        async def read() -> None:
            for _ in range(40):
                answer = await alice.http.get(f"{kind.path}/user?limit=1000")
                # A bulk write is visible as a whole or not at all.
                assert len(answer.json()) % 5 == 0

        await asyncio.gather(write(), read())
        count = await sql(service, f"SELECT COUNT(*) FROM {kind.name} WHERE user_id = {alice.id}")
        assert count == [(100,)]


async def test_jobs_are_filtered_and_sorted(service: Service) -> None:
    async with service.person() as alice:
        ended = await alice.generate("movies", 1)
        await alice.job_ended(ended["id"])
        slow = await alice.generate("characters", 100, "?rate=1")
        for query, wanted in (
            ("state=done", [ended["id"]]),
            ("kind=generate_characters", [slow["id"]]),
            ("total[gte]=100", [slow["id"]]),
            ("or[0][total]=1&or[1][id]=" + slow["id"] + "&sort=x", None),
            ("or[0][total]=1&or[1][id]=" + slow["id"], [slow["id"], ended["id"]]),
            ("state=lost", None),
        ):
            answer = await alice.http.get(f"/jobs?user_id={alice.id}&{query}")
            if wanted is None:
                assert answer.status_code == 422
            else:
                assert [job["id"] for job in answer.json()] == wanted, query
        await alice.http.delete(f"/jobs/{slow['id']}")


async def test_groups_of_conditions_are_alternatives(service: Service) -> None:
    async with service.person() as alice:
        for title, rating in (("A", 10), ("B", 20), ("C", 30), ("D", None)):
            await alice.add(title=title, rating=rating)
        query = "or[0][rating][gt]=25&or[1][title]=A&or[1][rating]=10&or[7][title][in]=D,E"
        assert (await alice.http.get(f"/movies/names?user_id={alice.id}&{query}")).json() == ["A", "C", "D"]
        answer = await alice.http.get(f"/movies/count?user_id={alice.id}&rating[ne]=30&{query}")
        assert answer.json() == {"count": 2}
        answer = await alice.http.get("/movies?or[0][planet]=1")
        assert answer.json()["detail"][0]["loc"] == ["query", "or[0][planet]"]


# --- searches


async def test_a_search_is_walked_in_the_order_of_the_ranks(service: Service) -> None:
    async with service.person() as alice:
        mark = f"rank{alice.id}"
        titles = [f"x {mark}", f"{mark} lime", f"{mark}", f"{mark} lîme", "other", f"lime in {mark}", f"{mark} lime"]
        rows = [{"title": title, "description": mark if title == "other" else None} for title in titles]
        await ok(alice.http.post("/movies/bulk", json=rows), 201)
        for query, wanted in (
            (mark, [2, 1, 3, 6, 0, 5, 4]),
            (f"{mark} lime", [1, 6, 3, 5]),
            (f"{mark} LÎME", [3, 1, 6, 5]),
        ):
            for narrowed in ("", f"&user_id={alice.id}"):
                found, url = [], f"/movies?q={query}&limit=2&fields=title{narrowed}"
                while url:
                    response = await alice.http.get(url)
                    assert response.headers["x-total-count"] == str(len(wanted))
                    found += [row["title"] for row in response.json()]
                    url = response.links.get("next", {}).get("url", "")
                assert found == [titles[place] for place in wanted], query
        second = (await alice.http.get(f"/movies?q={mark}&limit=2")).links["next"]["url"]
        for changed in (f"/movies?q={mark}x", f"/movies?q={mark}&sort=title"):
            after = second.partition("after=")[2].partition("&")[0]
            assert_problem(await alice.http.get(f"{changed}&after={after}"), 422, ["query", "after"])


# --- the size limit


async def test_a_page_is_bounded_in_bytes(service: Service) -> None:
    """The error for a page that would be too large says how many rows fit. Pages of that size are complete."""
    async with service.person() as alice:
        movie = await ok(alice.http.post("/movies", json={"title": "long"}), 201)
        rows = [{"name": f"n{n}", "description": "é" * 5_000, "movie_id": movie["id"]} for n in range(450)]
        await ok(alice.http.post("/characters/bulk", json=rows), 201)
        mine = f"/characters?user_id={alice.id}&sort=-name"
        for query in ("", "&q=n", "&after=0"):
            response = await alice.http.get(f"{mine.replace('&sort=-name', '') if query else mine}&limit=1000{query}")
            assert_problem(response, 422, ["query", "limit"])
            assert response.json()["detail"][0]["msg"].startswith("Expected at most 419: ")
        first = await ok(alice.http.get(f"{mine}&limit=419"))
        rest = await ok(alice.http.get(f"{mine}&limit=419&offset=419"))
        names = sorted((row["name"] for row in rows), reverse=True)
        assert [row["name"] for row in first + rest] == names
        # The limit does not affect pages of fewer rows or lists without the long text.
        assert len(await ok(alice.http.get(f"/characters/names?user_id={alice.id}&limit=1000"))) == 450
        assert len(await ok(alice.http.get(f"{mine}&limit=1000&offset=40"))) == 410
        included = await ok(alice.http.get(f"/movies/{movie['id']}?include=characters"))
        assert len(included["characters"]) == 419, "expected as many characters as fit"
        wide = [{"name": f"w{n}", "description": "\N{CLAPPER BOARD}" * 10_000} for n in range(110)]
        await ok(alice.http.post("/characters/bulk", json=wide), 201)
        response = await alice.http.get(f"/characters?name[prefix]=w&user_id={alice.id}&limit=110")
        assert response.json()["detail"][0]["msg"].startswith("Expected at most 104: ")
