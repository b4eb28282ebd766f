"""Popular, recent and similar movies."""

from __future__ import annotations

from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from core.filters import Condition, Op, build
from repository.catalog import similar
from repository.engine.database import Database
from repository.generic import lists
from repository.generic.cursors import Order
from repository.generic.lists import ListRequest
from resources.movies import MOVIES
from routes.catalog import discover
from tests.support.requests import assert_problem, ok
from tests.support.resources import head, links
from tests.support.service import Person, Service
from tests.support.statements import plan_of, statements


async def test_popular_movies_are_in_the_order_of_their_ratings(service: Service) -> None:
    async with AsyncExitStack() as stack:
        alice, bob, carol = [await stack.enter_async_context(service.person()) for _ in range(3)]
        movies = await alice.add_bulk([{"title": f"Popular {n}", "rating": n + 1} for n in range(6)])
        scores = [[9, 9], [10], [], [7, 7, 7], [9, 9], [8, 9]]
        for movie, given in zip(movies, scores, strict=True):
            for person, score in zip((alice, bob, carol), given, strict=False):
                await ok(person.http.post(f"/movies/{movie['id']}/ratings", json={"score": score}), 201)
        own = f"/movies/popular?user_id={alice.id}"
        found = await alice.http.get(own)
        # The number of ratings, then their average, then the id.
        assert titles(found) == [f"Popular {n}" for n in (3, 0, 4, 5, 1)]
        assert found.headers["x-total-count"] == "5"
        assert found.headers["stream-position"].endswith(f":{await head(service)}")
        assert found.json()[0] == await ok(alice.http.get(f"/movies/{movies[3]['id']}"))

        assert await walk(alice, f"{own}&limit=2&fields=title") == [["3", "0"], ["4", "5"], ["1"]]
        assert numbers(await alice.http.get(f"{own}&rating[lte]=4&limit=1&offset=1")) == ["0"]
        assert numbers(await alice.http.get(f"{own}&q=popular%205&or[0][rating]=6&or[1][rating]=1")) == ["5"]
        assert numbers(await alice.http.get(f"{own}&fields=title&ratings_count[lt]=2")) == ["1"]
        for query in ("sort=title", "after=1", "colour=red"):
            assert_problem(await alice.http.get(f"/movies/popular?{query}"), 422, ("query", query.partition("=")[0]))


async def test_recent_movies_are_those_released_up_to_today_the_newest_first(service: Service) -> None:
    today = datetime.now(UTC).date()
    # Even if the day ends during the test, the day after tomorrow is still in the future.
    dates = [today, None, today - timedelta(days=400), today + timedelta(days=2), today, today - timedelta(days=1)]
    async with service.person() as alice, service.anyone() as reader:
        rows = [{"title": f"Recent {n}", "release_date": day and day.isoformat()} for n, day in enumerate(dates)]
        await alice.add_bulk(rows)
        own = f"/movies/recent?user_id={alice.id}"
        found = await reader.get(own)
        assert numbers(found) == ["0", "4", "5", "2"]
        assert found.headers["x-total-count"] == "4"
        assert await walk(alice, f"{own}&limit=3") == [["0", "4", "5"], ["2"]]
        assert numbers(await reader.get(f"{own}&release_date[lt]={today}&offset=1")) == ["2"]
        # The cursor of another order is rejected.
        cursor = links(await reader.get("/movies?sort=title&limit=1"))["next"].partition("after=")[2]
        assert_problem(await reader.get(f"/movies/recent?after={cursor.partition('&')[0]}"), 422, ("query", "after"))


@pytest.mark.parametrize(
    ("order", "only", "index"),
    [
        (discover.POPULAR, ("ratings_count", Op.GT, 0), "ix_movies_popular"),
        (discover.RECENT, ("release_date", Op.LTE, "2026-11-30"), "ix_movies_release_date"),
    ],
)
async def test_popular_and_recent_movies_are_read_in_the_order_of_an_index(
    database: Database, order: Order, only: tuple[str, Op, Any], index: str
) -> None:
    field, op, value = only
    request = ListRequest(filter=build([Condition(MOVIES.fields[field], op, value)]), sort=order)
    async with statements(database) as found:
        await lists.page_of(database, MOVIES, request)
    plan = await plan_of(database, *found[-1])
    if database.is_sqlite:
        # The only sort is that of the rows of the page. The index also counts the rows.
        assert (plan.count(f"movies USING COVERING INDEX {index}"), plan.count("TEMP B-TREE")) == (2, 1), plan
    else:
        assert f"using {index}" in plan, plan
        assert "cost=100000" not in plan.partition(index)[0].rpartition("Limit")[2], plan


async def test_similar_movies_share_genres_cast_and_fans(service: Service) -> None:
    async with service.admin() as chief, service.person() as alice, service.person() as bob:
        genres = [f"similar genre {n}" for n in range(2)]
        cast = [await chief.add("actors", name=f"Similar Actor {n}") for n in range(2)]
        names = [actor["name"] for actor in cast]

        async def movie(title: str, shown: list[str], actors: list[str]) -> dict[str, Any]:
            return await chief.add(title=title, genres=shown, actors=actors)

        third = await movie("of 0", genres, names[:1])
        await chief.add("characters", name="Anna", movie_id=third["id"], actor_id=cast[1]["id"])
        both_genres = await movie("of 1", genres, [])
        one_genre = await movie("of 2", genres[:1], [])
        played = await movie("of 3", [], [])  # an actor of a character
        # An actor who is shown and also plays a character counts once.
        for actor in cast:
            await chief.add("characters", name="Twin", movie_id=played["id"], actor_id=actor["id"])
        await ok(chief.http.patch(f"/movies/{played['id']}", json={"actors": names[:1]}))
        liked = await movie("of 4", [], [])
        disliked = await movie("of 5", genres[1:], [])
        await movie("of 6", ["similar genre of no other"], [])
        for person, row, score in [
            *((who, row, 9) for who in (alice, bob) for row in (third, liked)),
            (chief, third, 7),
            (chief, liked, 7),
            (chief, one_genre, 7),
            (alice, disliked, 6),
        ]:
            await ok(person.http.post(f"/movies/{row['id']}/ratings", json={"score": score}), 201)

        path = f"/movies/{third['id']}/similar"
        found = await alice.http.get(path)
        # In points: 6 (two actors), 4 (two genres), 3 (a genre and a user), 3 (three users), 2 (a genre).
        assert numbers(found) == ["3", "1", "2", "4", "5"]
        assert found.headers["x-total-count"] == "5"
        assert found.headers["stream-position"].endswith(f":{await head(service)}")
        assert found.json()[1] == both_genres
        async with service.anyone() as reader:
            page = await reader.get(f"{path}?limit=2&offset=2&fields=title")
            assert page.json() == [{"title": "of 2"}, {"title": "of 4"}]
            assert {"first", "prev", "next", "last"} <= links(page).keys()
            assert numbers(await reader.get(links(page)["next"])) == ["5"]
            assert titles(await reader.get(f"{path}?limit=0")) == []
            past = await reader.get(f"{path}?offset=100")
            assert (past.json(), past.headers["x-total-count"]) == ([], "5")
            assert_problem(await reader.get(f"{path}?genre=Noir"), 422, ("query", "genre"))
            await ok(reader.get(f"/movies/{10**9}/similar"), 404)
        alone = await chief.add(title="alone")
        nothing = await alice.http.get(f"/movies/{alone['id']}/similar")
        assert (nothing.json(), nothing.headers["x-total-count"]) == ([], "0")


async def test_a_genre_of_very_many_movies_costs_bounded_work(service: Service) -> None:
    """The movies with the most in common are found even if most movies have the same genre."""
    async with service.admin() as chief:
        genre, actor = "similar crowd", "Similar Crowd Actor"
        many = similar.MOVIES_PER_LINK + 50
        rows = [{"title": f"crowd {n}", "genres": [genre]} for n in range(many)]
        rows[0]["actors"] = rows[-1]["actors"] = [actor]
        added = await chief.add_bulk(rows)
        found = await chief.http.get(f"/movies/{added[-1]['id']}/similar?limit=1000&fields=id")
        assert found.headers["x-total-count"] == str(similar.MAX_SIMILAR_MOVIES)
        ids = [row["id"] for row in found.json()]
        # The oldest movie is not among the newest of the genre, but shares it; the others have equal points.
        first, *others = ids
        assert first == added[0]["id"]
        assert others == sorted(others)


def titles(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [row["title"] for row in answer.json()]


def numbers(answer: httpx.Response) -> list[str]:
    return [title.rpartition(" ")[2] for title in titles(answer)]


async def walk(person: Person, path: str) -> list[list[str]]:
    """Return the numbers of the movies of each page, following `next`."""
    pages = []
    found: str | None = path
    while found is not None:
        answer = await person.http.get(found)
        pages.append(numbers(answer))
        found = links(answer).get("next")
    return pages
