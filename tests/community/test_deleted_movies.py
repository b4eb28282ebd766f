"""Deleting movies together with everything that refers to them: one transaction, with all events in order."""

from __future__ import annotations

from typing import Any

from tests.support.requests import ok
from tests.support.resources import moderator, nothing_written, sql
from tests.support.service import Person, Service, Watcher

Row = dict[str, Any]


async def with_everything(mona: Person, bob: Person) -> tuple[Row, Row]:
    """Add a movie with links, a character, a comment with a reply, ratings and watchlist entries of two users."""
    links: Row = {"country": "GB", "languages": ["English"], "genres": [mona.name], "actors": [mona.name]}
    movie = await mona.add(**links)
    path = f"/movies/{movie['id']}"
    character = await bob.add("characters", movie_id=movie["id"])
    comment = await ok(bob.http.post(f"{path}/comments", json={"text": "Zither!"}), 201)
    await ok(mona.http.post(f"/comments/{comment['id']}/replies", json={"text": "Indeed."}), 201)
    for person in (mona, bob):
        await ok(person.http.post(f"{path}/ratings", json={"score": 9}), 201)
        await ok(person.http.post("/watchlist", json={"movie_id": movie["id"]}), 201)
    return await ok(mona.http.get(path)), character


async def expect(watcher: Watcher, *wanted: tuple[str, str]) -> list[Row]:
    events = [await watcher.next() for _ in wanted]
    assert [(event["topic"], event["operation"]) for event in events] == list(wanted)
    return events


async def test_deleted_movies_take_everything_along_in_one_transaction(service: Service) -> None:
    topics = "topics=movies,characters,comments,ratings,watchlist,genres,actors,countries,languages"
    async with moderator(service) as mona, service.person() as bob:
        movies = [await with_everything(mona, bob) for _ in range(3)]
        async with service.watch(topics, additional_headers=bob.bearer) as watcher:
            (one, character), *others = movies
            assert (await mona.http.delete(f"/movies/{one['id']}")).status_code == 204
            linked = [(name, "update") for name in ("countries", "languages", "genres", "actors")]
            taken = [("comments", "delete_bulk"), ("ratings", "delete_bulk")]
            # Of the watchlist entries, each owner sees their own.
            events = await expect(
                watcher,
                ("characters", "update"),
                *taken,
                ("watchlist", "delete"),
                *linked,
                ("movies", "delete"),
            )
            assert events[0]["data"]["id"] == character["id"]
            counts = [event["data"]["movies_count"] for event in events[4:8]]
            assert counts[2:] == [2, 2]
            assert all(event["actor_id"] == mona.id for event in events)
            assert events[-1]["seq"] - events[0]["seq"] == len(events), "the entry of the other user is in between"

            ids = [movie["id"] for movie, _ in others]
            assert (await mona.http.request("DELETE", "/movies/bulk", json={"ids": ids})).status_code == 200
            events = await expect(
                watcher,
                ("characters", "update_bulk"),
                *taken,
                ("watchlist", "delete_bulk"),
                *linked,
                ("movies", "delete_bulk"),
            )
            assert [event["data"]["count"] for event in events if "count" in event["data"]] == [2, 4, 4, 2, 2]
            assert [event["data"]["movies_count"] for event in events[4:8]] == [count - 2 for count in counts]
        listed = ", ".join(str(movie["id"]) for movie, _ in movies)
        for table in ("comments", "ratings", "watchlist", "movie_genres", "movie_languages", "movie_actors"):
            assert await sql(service, f"SELECT * FROM {table} WHERE movie_id IN ({listed})") == [], table
        async with nothing_written(service):
            assert (await mona.http.delete(f"/movies/{one['id']}")).status_code == 404
