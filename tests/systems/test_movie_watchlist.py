"""A service for what to watch: users find movies, keep a private watchlist, and rate what they have watched."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest

from tests.conftest import Places
from tests.support.requests import assert_problem, change_group, ok
from tests.support.servers.mail import fresh_name
from tests.support.service import PASSWORD, Service
from tests.support.sockets import signed_in


@pytest.fixture(scope="module")
def place(new_places: Callable[[], Places], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose users rate only movies that they have watched."""
    places, folder = new_places(), tmp_path_factory.mktemp("watchlist")
    settings = {"RATINGS_REQUIRE_WATCHED": "true"}
    with Service(places.database_url, places.broadcast_url, folder, **settings).running() as service:
        yield service


@asynccontextmanager
async def registered_by_address(place: Service) -> AsyncIterator[httpx.AsyncClient]:
    """Register with an email address alone, sign in with it, and yield the signed-in client."""
    async with place.anyone() as client:
        account = {"email": f"{fresh_name()}@example.org", "password": PASSWORD}
        await ok(client.post("/auth/register", json=account), 201)
        tokens = await ok(client.post("/auth/login", json=account))
        client.headers["Authorization"] = f"Bearer {tokens['access_token']}"
        yield client


async def test_a_user_finds_a_movie(place: Service) -> None:
    async with place.admin() as chief, place.person() as maud, registered_by_address(place) as holly:
        # Moderators keep the genres and add movies with new actors; users choose from them.
        await change_group(chief, maud, "moderator")
        noir = await ok(maud.http.post("/genres", json={"name": "Film noir", "description": "Shadows."}), 201)
        assert (await holly.post("/genres", json={"name": "Shadows"})).status_code == 403
        assert (await maud.http.post("/genres", json={"name": "FILM NOIR"})).status_code == 409
        links = {"genres": ["film noir"], "languages": ["de", "English"], "actors": ["Orson Welles"]}
        body = {"title": "Der dritte Mann", "release_date": "1949-09-01", "country": "GB", **links}
        movie = await ok(maud.http.post("/movies", json=body), 201)
        assert (movie["genres"], movie["languages"]) == (["Film noir"], ["German", "English"])
        await maud.add(title="The Fallen Idol", country="GB")

        for query in ("q=dritt+man", "genre=Film+noir", "language=German&country=GB", "actor=Orson+Welles"):
            assert await ok(holly.get(f"/movies?{query}")) == [movie], query
        assert await ok(holly.get(f"/genres/{noir['id']}/movies?fields=id")) == [{"id": movie["id"]}]
        assert (await ok(holly.get(f"/genres/{noir['id']}")))["movies_count"] == 1
        assert "Film noir" in await ok(holly.get("/genres/names"))
        assert (await ok(holly.get("/countries/at")))["name"] == "Austria"
        assert await ok(holly.get("/languages?q=germ&fields=code,name")) == [{"code": "de", "name": "German"}]
        renamed = await ok(maud.http.patch(f"/genres/{noir['id']}", json={"name": "Noir"}))
        assert (await ok(holly.get(f"/movies/{movie['id']}")))["genres"] == [renamed["name"]]


async def test_a_watchlist_is_private(place: Service) -> None:
    async with place.person() as holly, place.person() as anna, place.admin() as chief:
        first, second = await anna.add(title="The Third Man"), await anna.add(title="The Fallen Idol")
        body = {"movie_id": first["id"], "status": "planned", "notes": "With Anna, on a big screen"}
        answer = await holly.http.post("/watchlist", json=body)
        entry, path = answer.json(), answer.headers["location"]
        assert (answer.status_code, path) == (201, f"/watchlist/{entry['id']}")
        assert_problem(await holly.http.post("/watchlist", json=body), 409, ["body", "movie_id"])
        await ok(holly.http.post("/watchlist", json={"movie_id": second["id"], "status": "watching"}), 201)
        assert (await holly.http.post("/watchlist", json={"movie_id": 10**9})).status_code == 409
        assert_problem(await holly.http.post("/watchlist", json=body | {"status": "bored"}), 422, ["body", "status"])

        assert await ok(holly.http.get("/watchlist?status=planned")) == [entry]
        assert await ok(holly.http.get("/watchlist?q=third")) == [entry], "by the title of the movie"
        assert await ok(holly.http.get("/watchlist?q=big+screen")) == [entry], "by the notes"
        newest = await holly.http.get("/watchlist?sort=-created_at&skip=1&limit=1")
        assert (newest.json(), newest.headers["x-total-count"]) == ([entry], "2")
        for other in (anna, chief):
            assert await ok(other.http.get("/watchlist")) == []
            assert (await other.http.get(path)).status_code == 404
        replaced = await ok(holly.http.put(path, json=entry | {"status": "watched"}))
        assert replaced["watched_at"] == replaced["updated_at"]
        assert (await ok(holly.http.patch(path, json={"status": "dropped"})))["watched_at"] is None
        assert (await holly.http.delete(path)).status_code == 204
        assert len(await ok(holly.http.get("/watchlist"))) == 1


async def test_a_user_rates_a_movie_once_it_is_watched(place: Service) -> None:
    async with place.person() as holly, place.person() as anna:
        movie = await anna.add()
        ratings = f"/movies/{movie['id']}/ratings"
        entry = await ok(holly.http.post("/watchlist", json={"movie_id": movie["id"]}), 201)
        assert (await holly.http.post(ratings, json={"score": 9})).status_code == 403
        await ok(holly.http.patch(f"/watchlist/{entry['id']}", json={"status": "watched"}))
        rating = await ok(holly.http.post(ratings, json={"score": 9}), 201)
        assert await ok(holly.http.get("/ratings")) == [rating]
        assert (await ok(holly.http.put(f"/ratings/{rating['id']}", json={"score": 10})))["score"] == 10
        assert (await ok(anna.http.get(f"/movies/{movie['id']}")))["average_rating"] == 10
        assert (await anna.http.delete(f"/ratings/{rating['id']}")).status_code == 403
        assert (await holly.http.delete(f"/ratings/{rating['id']}")).status_code == 204
        comment = await ok(holly.http.post(f"/movies/{movie['id']}/comments", json={"text": "Watched twice."}), 201)
        assert [each["id"] for each in await ok(anna.http.get(f"/movies/{movie['id']}/comments"))] == [comment["id"]]


async def test_a_deleted_movie_leaves_the_watchlist_at_once(place: Service) -> None:
    async with place.person() as holly, place.person() as anna:
        movie = await anna.add()
        async with place.watch("topics=watchlist", **signed_in(holly)) as screen:
            entry = await ok(holly.http.post("/watchlist", json={"movie_id": movie["id"]}), 201)
            await screen.sees(entry)
            assert (await anna.http.delete(f"/movies/{movie['id']}")).status_code == 204
            gone = await screen.next()
            ids = gone["data"]["ids"] if gone["operation"] == "delete_bulk" else [gone["data"]["id"]]
            assert (gone["topic"], ids) == ("watchlist", [entry["id"]])
        assert await ok(holly.http.get("/watchlist")) == []
