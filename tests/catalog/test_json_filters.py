"""The parameter `filter`: the JSON form of the filters of lists and counts, as in `subscribe` on the websocket."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import pytest

from core import filters
from routes.table import OPERATIONS
from tests.support.backends import SQLITE_ONLY
from tests.support.requests import assert_problem, ok, over_socket
from tests.support.resources import links
from tests.support.service import Person, Service

ROWS: list[dict[str, Any]] = [
    {"title": "Gilda", "rating": 50, "genres": ["Noir"], "country": "US"},
    {"title": "Laura, 1944", "rating": 60, "genres": ["Noir", "Drama"], "country": "US"},
    {"title": "M", "rating": 70, "genres": ["Crime"], "country": "DE"},
    {"title": "Ossessione", "rating": None, "genres": ["Drama"], "country": "IT"},
]
# Queries with `filter`, and the rows that match.
QUERIES: list[tuple[Any, str, list[int]]] = [
    ({}, "", [0, 1, 2, 3]),
    ({"genre": "Noir"}, "", [0, 1]),
    ({"rating": {"gte": 60.0, "lt": 70}}, "", [1]),
    ({"title": {"in": ["Laura, 1944", "M"]}}, "", [1, 2]),
    ({"country": "US", "or": [{"genre": "Drama"}, {"rating": {"lte": 50}, "title": {"prefix": "gil"}}]}, "", [0, 1]),
    ({"genre": "Drama"}, "country=US", [1]),
    ({"country": "US"}, "country=DE", []),
    ({"or": [{"country": "US"}, {"country": "DE"}]}, "rating[gte]=60", [1, 2]),
    ({"rating": {"gte": 60}}, "or[0][country]=US&or[1][country]=IT", [1]),
    # With groups in both, one of each must match.
    ({"or": [{"country": "US"}, {"country": "DE"}]}, "or[0][genre]=Drama&or[1][genre]=Crime", [1, 2]),
    ({"genre": "Noir"}, "q=laura&sort=-id", [1]),
    ({"genre": {"in": ["Noir", "Crime"]}}, "sort=-rating", [2, 1, 0]),
]


def query_of(value: Any) -> str:
    return f"filter={quote(json.dumps(value))}"


async def add_rows(alice: Person) -> None:
    await alice.add_bulk(ROWS)


async def test_filter_selects_the_rows_of_a_list_and_a_count(service: Service) -> None:
    async with service.person() as alice, service.watch() as watcher:
        await add_rows(alice)
        for value, more, wanted in QUERIES:
            query = f"user_id={alice.id}&{query_of(value)}&{more}"
            titles = [ROWS[n]["title"] for n in wanted]
            assert await ok(alice.http.get(f"/movies/names?{query}")) == titles, query
            assert [row["title"] for row in await ok(alice.http.get(f"/movies?{query}"))] == titles
            if "sort" not in more:
                assert await ok(alice.http.get(f"/movies/count?{query}")) == {"count": len(wanted)}
            assert (await over_socket(watcher, "GET", f"/movies/names?{query.rstrip('&')}"))["body"] == titles


async def test_links_keep_the_filter(service: Service) -> None:
    async with service.person() as alice:
        await add_rows(alice)
        for start in ("sort=-rating", "sort=-title&offset=0", "after=0"):
            url = f"/movies?user_id={alice.id}&{query_of({'or': [{'genre': 'Noir'}, {'title': 'M'}]})}&limit=1&{start}"
            seen = []
            while url:
                answer = await alice.http.get(url)
                seen += [row["title"] for row in await ok(alice.http.get(url))]
                url = links(answer).get("next", "")
            assert sorted(seen) == ["Gilda", "Laura, 1944", "M"], start


async def test_every_list_and_count_with_filters_takes_filter(service: Service) -> None:
    async with service.admin() as chief:
        filtered = [each for each in OPERATIONS if each.filters and not each.path.endswith("/export")]
        assert {"/jobs", "/users", "/admin/audit", "/genres/count"} <= {each.path for each in filtered}
        movie, actor = await chief.add(), await chief.add("actors")
        genre = (await ok(chief.http.get("/genres?limit=1")))[0]
        comment = await ok(chief.http.post(f"/movies/{movie['id']}/comments", json={"text": "Fine"}), 201)
        ids = {"movies": movie["id"], "comments": comment["id"], "actors": actor["id"], "genres": genre["id"]}
        ids |= {"countries": "GB", "languages": "en"}
        for operation in filtered:
            id_ = ids.get(operation.path.split("/")[1])
            path = operation.path.format(user_id=chief.id, username=chief.name, id=id_)
            past = query_of({"created_at": {"lt": "2000-01-01T00:00:00Z"}})
            assert await ok(chief.http.get(f"{path}?{past}")) in ([], {"count": 0}), path
            assert_problem(await chief.http.get(f"{path}?filter=x"), 422, ["query", "filter"])


INVALID: list[tuple[str, list[Any]]] = [
    ("", []),
    ("{", []),
    ("x", []),
    ("null", []),
    ("[]", []),
    ('"genre"', []),
    ('{"planet": 1}', ["planet"]),
    ('{"rating": "50"}', ["rating"]),
    ('{"rating": {"like": 1}}', ["rating", "like"]),
    ('{"title": {"in": []}}', ["title", "in"]),
    ('{"or": []}', ["or"]),
    ('{"or": [{"genre": "Noir"}, {}]}', ["or", 1]),
    (json.dumps({"or": [{"id": 1}] * (filters.MAX_GROUPS + 1)}), []),
    ("[" * 2_000, []),
    (json.dumps({"title": "x" * (filters.MAX_TEXT_LENGTH + 1)}), ["title"]),
]


@pytest.mark.parametrize(("text", "place"), INVALID, ids=[text[:30] for text, _ in INVALID])
@SQLITE_ONLY
async def test_every_problem_of_a_filter_names_it(service: Service, text: str, place: list[Any]) -> None:
    async with service.anyone() as anonymous:
        for path in ("/movies", "/movies/count"):
            answer = await anonymous.get(path, params={"filter": text})
            assert_problem(answer, 422, ["query", "filter", *place])


@SQLITE_ONLY
async def test_the_number_of_conditions_is_bounded_and_problems_are_reported_together(service: Service) -> None:
    async with service.anyone() as anonymous:
        group = {"rating": {"gt": 1, "lt": 2, "gte": 3, "lte": 4}, "budget": {"gt": 1, "lt": 2, "gte": 3, "lte": 4}}
        group |= {"revenue": {"gt": 1, "lt": 2, "gte": 3}}
        answer = await anonymous.get("/movies", params={"filter": json.dumps({"or": [group] * filters.MAX_GROUPS})})
        assert_problem(answer, 422, ["query", "filter"])
        assert answer.json()["detail"][0]["type"] == "too_many_conditions"
        answer = await anonymous.get("/movies?filter={}&filter={}")
        assert_problem(answer, 422, ["query", "filter"])
        answer = await anonymous.get('/movies?filter={"x":1}&sort=y&rating=z')
        assert_problem(answer, 422, ["query", "sort"], ["query", "rating"], ["query", "filter", "x"])
