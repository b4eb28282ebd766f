"""Generated casts, ratings and comments of movies, and generated actors and ratings of existing movies."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from fractions import Fraction
from functools import partial
from random import Random
from typing import Any

from sqlalchemy import text

from core.identity import Group, Identity
from jobs import chunks, opinions
from repository.accounts.invented_users import INVENTED_USERS
from repository.catalog.generated import Movie
from repository.community import generated_ratings
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic import writes
from repository.jobs import ClaimedJob
from resources.movies import MOVIES, MovieBody
from resources.ratings import average_of
from services.movie_parts import PARTS, Plan
from tests.support.accounts import account
from tests.support.backends import SQLITE_ONLY
from tests.support.requests import assert_problem
from tests.support.resources import moderator, nothing_written, sql, watching
from tests.support.service import Service, Watcher

Row = dict[str, Any]
ALL = "with=characters,ratings,comments"
# For each derived value, a query for the rows in which it differs from what it is derived from.
DERIVED = (
    *(
        f"SELECT id FROM {parent} WHERE {count} <> (SELECT COUNT(*) FROM {child} WHERE {column} = {parent}.id)"
        for parent, count, child, column in (
            ("movies", "characters_count", "characters", "movie_id"),
            ("movies", "comments_count", "comments", "movie_id"),
            ("movies", "ratings_count", "ratings", "movie_id"),
            ("actors", "characters_count", "characters", "actor_id"),
            ("actors", "movies_count", "movie_actors", "actor_id"),
            ("genres", "movies_count", "movie_genres", "genre_id"),
            ("languages", "movies_count", "movie_languages", "language_id"),
        )
    ),
    "SELECT id FROM movies m WHERE ratings_sum <> (SELECT COALESCE(SUM(score), 0) FROM ratings WHERE movie_id = m.id)",
    "SELECT id FROM comments WHERE replies_count <> (SELECT COUNT(*) FROM comments b WHERE b.parent_id = comments.id)",
    "SELECT id FROM countries WHERE movies_count <> (SELECT COUNT(*) FROM movies WHERE country = countries.code)",
    "SELECT movie_id FROM ratings GROUP BY movie_id, user_id HAVING COUNT(*) > 1",
)


async def assert_exact(select: Callable[[str], Awaitable[Sequence[Any]]]) -> None:
    """Assert that all derived counts of the catalog, and the averages, are exact."""
    for query in DERIVED:
        assert list(await select(query)) == [], query
    for average, total, count in await select("SELECT average_rating, ratings_sum, ratings_count FROM movies"):
        assert average == average_of(total, count)


async def added(watcher: Watcher, topics: Sequence[str], job: Row) -> dict[str, list[Row]]:
    """Return the rows of the job's events up to its end, by topic. No event of the job may be about another topic."""
    await watcher.until(lambda frame: frame.get("data", {}).get("state") == "done" and "seq" in frame)
    found: dict[str, list[Row]] = {topic: [] for topic in topics}
    for event in watcher.events:
        if event["operation"] == "add_bulk" and event["data"]["job_id"] == job["id"] and event["topic"] != "genres":
            found[event["topic"]] += event["data"]["items"]
    return found


async def test_movies_come_with_casts_ratings_and_comments(service: Service) -> None:
    async with service.admin() as admin, service.person() as alice:
        accounts = (await admin.http.get("/users?limit=0")).headers["X-Total-Count"]
        await admin.generated("actors", 60, "?seed=3")
        async with watching(service) as watcher:
            job = await alice.generate("movies", 20, f"?{ALL}&seed=7&batch_size=60")
            assert (job["kind"], job["total"]) == ("generate_movies", 230)
            found = await added(watcher, ("movies", *PARTS), job)
        assert {topic: len(rows) for topic, rows in found.items()} == {
            "movies": 20,
            "characters": 70,
            "ratings": 100,
            "comments": 40,
        }
        assert (await alice.http.get(f"/jobs/{job['id']}")).json()["done"] == 230
        await assert_exact(partial(sql, service))
        actors = {row["id"]: row for row in (await alice.http.get("/actors?limit=1000")).json()}
        for movie in found["movies"]:
            mine = {topic: [row for row in found[topic] if row["movie_id"] == movie["id"]] for topic in PARTS}
            scores = [row["score"] for row in mine["ratings"]]
            assert movie["average_rating"] == average_of(sum(scores), len(scores))
            assert [movie[f"{topic}_count"] for topic in PARTS] == [len(mine[topic]) for topic in PARTS]
            assert [actors[row["actor_id"]]["name"] for row in mine["characters"]] == movie["actors"]
            assert (await alice.http.get(f"/movies/{movie['id']}")).json() == movie
        first = {topic: rows[0] for topic, rows in found.items()}
        for topic, row in first.items():
            assert (await alice.http.get(f"/{topic}/{row['id']}")).json() == row
        for topic in ("movies", "characters"):
            assert {row["user_id"] for row in found[topic]} == {alice.id}
        replies = [row for row in found["comments"] if row["parent_id"] is not None]
        above = {row["id"]: row for row in found["comments"]}
        assert replies
        assert all(row["depth"] == above[row["parent_id"]]["depth"] + 1 for row in replies)

        # Nobody sees the invented users, and nobody else has rated or commented.
        authors = {row["user_id"] for row in (*found["ratings"], *found["comments"])}
        assert alice.id not in authors
        assert (await admin.http.get("/users?limit=0")).headers["X-Total-Count"] == accounts
        assert (await admin.http.get(f"/users/{min(authors)}")).status_code == 404
        assert (await admin.http.post(f"/admin/users/{min(authors)}/activate")).status_code == 404
        assert (await alice.http.get("/ratings")).json() == (await alice.http.get("/comments/user")).json() == []
        assert (await alice.http.put(f"/ratings/{first['ratings']['id']}", json={"score": 1})).status_code == 403
        assert (await admin.http.delete(f"/comments/{first['comments']['id']}")).status_code == 204

        # Characters of existing movies are played by existing actors.
        async with watching(service) as watcher:
            alone = await added(watcher, ["characters"], await alice.generate("characters", 50))
        assert all(row["actor_id"] in actors for row in alone["characters"])
        await assert_exact(partial(sql, service))


async def test_actors_are_people_whom_only_staff_generate(service: Service) -> None:
    async with service.admin() as admin, service.person() as alice, moderator(service) as mona:
        assert_problem(await alice.http.post("/actors/generate/10"), 403)
        assert_problem(await alice.http.post("/ratings/generate/10"), 403)
        made = []
        for batch_size in (1_000, 7):
            async with watching(service) as watcher:
                job = await mona.generate("actors", 40, f"?seed=5&batch_size={batch_size}")
                rows = (await added(watcher, ["actors"], job))["actors"]
                made.append(
                    [{name: row[name] for name in ("name", "birth_date", "country", "biography")} for row in rows]
                )
        assert made[0] == made[1]
        assert len({actor["name"] for actor in made[0]}) > 30
        assert len({actor["country"] for actor in made[0]}) > 5
        trail = (await admin.http.get(f"/admin/audit?actor_id={mona.id}")).json()
        assert sum(entry["count"] for entry in trail) == 80
        assert {(entry["action"], entry["resource"]) for entry in trail} == {("create", "actors")}

        job = await mona.generate("actors", 1_000, "?rate=20")
        await sql(service, f"UPDATE users SET \"group\" = 'user' WHERE id = {mona.id}")
        ended = await mona.job_ended(job["id"])
        assert (ended["state"], ended["error"]) == ("failed", "Only moderators and admins may add actors")
        assert ended["done"] < 1_000


async def test_existing_movies_get_ratings(service: Service) -> None:
    async with service.person() as alice, moderator(service) as mona:
        movies = await alice.add_bulk([{"title": "Liked", "rating": 90}, {"title": "Disliked", "rating": 20}])
        await alice.http.post(f"/movies/{movies[0]['id']}/ratings", json={"score": 1})
        async with watching(service) as watcher:
            found = (await added(watcher, ["ratings"], await mona.generate("ratings", 150, "?batch_size=60")))[
                "ratings"
            ]
        assert len({row["id"] for row in found}) == 150
        updated = {
            row["id"]: row
            for event in watcher.events
            if event["topic"] == "movies"
            for row in event["data"].get("items", [event["data"]])
        }
        assert {row["movie_id"] for row in found} == updated.keys()
        for movie in list(updated.values())[:3]:
            assert (await alice.http.get(f"/movies/{movie['id']}")).json() == movie
        await assert_exact(partial(sql, service))


async def test_invented_users_rate_each_movie_at_most_once(database: Database) -> None:
    alice = await account(database, "alice", Group.MODERATOR)
    identity = Identity(alice, Group.MODERATOR, 0.0, "", "alice")
    titles = [MovieBody(title=f"m{number}").model_dump() for number in range(3)]
    await database.write(lambda tx: writes.add_bulk(tx, MOVIES, identity, titles, skip_conflicts=False))

    async def rate(count: int, seed: int) -> int:
        async def work(tx: Transaction) -> int:
            return await generated_ratings.add(tx, identity, count, Random(seed), opinions.score, "a job")

        return await database.write(work)

    # At the same time, too: the second transaction finds what the first one has stored.
    assert [*await asyncio.gather(rate(70, 1), rate(50, 2), rate(40, 3))] == [70, 50, 40]
    left = 3 * INVENTED_USERS - 160
    assert await rate(1_000, 4) == left
    assert await rate(1, 5) == 0
    await assert_exact(lambda query: database.select(text(query)))


async def test_jobs_of_all_kinds_continue_exactly_after_a_kill(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.admin() as admin:
        # Without movies, there is nothing to rate.
        ended = await admin.job_ended((await admin.generate("ratings", 5))["id"])
        assert (ended["state"], ended["done"], ended["error"]) == ("failed", 0, chunks.TOO_FEW_MOVIES)
        await admin.generated("actors", 30)
        await admin.generated("movies", 100)
        orders = [
            ("movies", 40, f"?{ALL}&rate=150&batch_size=40"),
            *((name, 400, "?rate=150") for name in ("actors", "ratings")),
        ]
        ordered = [await admin.generate(*order) for order in orders]
        async with service.watch("topics=movies,actors,ratings") as watcher:
            seen: set[str] = set()
            while len(seen) < 3:
                frame = await watcher.next(60)
                if frame["operation"] == "add_bulk":
                    seen.add(next(job["kind"] for job in ordered if job["id"] == frame["data"]["job_id"]))
        await asyncio.to_thread(service.kill)
        await sql(service, "UPDATE jobs SET lease_until = 0")  # let the leases of the killed process expire
        await asyncio.to_thread(service.start)
        for job in ordered:
            ended = await admin.job_ended(job["id"])
            assert (ended["state"], ended["done"]) == ("done", job["total"])
        counts = {
            name: (await sql(service, f"SELECT COUNT(*) FROM {name}"))[0][0]
            for name in ("movies", "actors", "characters", "ratings", "comments")
        }
        assert counts == {"movies": 140, "actors": 430, "characters": 140, "ratings": 600, "comments": 80}
        await assert_exact(partial(sql, service))


@SQLITE_ONLY
async def test_invalid_parts_are_rejected(service: Service) -> None:
    async with service.person() as alice, nothing_written(service):
        for value in ("actors", "", "characters,", "Characters", "characters;ratings", "character,ratings"):
            answer = await alice.http.post("/movies/generate/1", params={"with": value})
            assert_problem(answer, 422, ["query", "with"])
            named = next(word for word in value.split(",") if word not in PARTS)
            assert f'got "{named}"' in answer.text.replace("\\", "")
        assert 'did you mean \\"characters\\"?' in answer.text
        assert_problem(await alice.http.post("/characters/generate/1?with=ratings"), 422, ["query", "with"])
        answer = await alice.http.post(f"/movies/generate/86957?{ALL}")
        assert_problem(answer, 422, ["path", "number"])
        assert "Expected at most 86956 movies" in answer.text


def job_of(parts: Sequence[str], batch_size: int, movies: int = 43) -> ClaimedJob:
    total = Plan(parts).rows_of(movies)
    return ClaimedJob("x", "generate_movies", 0, total, 5, batch_size, None, parts, 1, None)


def movies_of(job: ClaimedJob) -> list[Movie]:
    """Return the movies of all chunks of a job, and assert that the sizes of the chunks are right."""
    found: list[Movie] = []
    done = 0
    while done < job.total:
        chunk = chunks.make(job, done, is_sqlite=True)
        assert 0 < chunk.size == sum(movie.size for movie in chunk.movies) <= job.batch_size
        assert chunk.size == chunks.size_after(job, done)
        found += chunk.movies
        done += chunk.size
    return found


def test_a_seed_repeats_what_belongs_to_a_movie_with_any_batch_size_and_other_parts() -> None:
    whole = movies_of(job_of(PARTS, 1_000))
    assert len(whole) == 43
    assert whole == movies_of(job_of(PARTS, Plan(PARTS).most)) == movies_of(job_of(PARTS, 57))
    for movie, alone in zip(whole, movies_of(job_of(["ratings"], 100)), strict=True):
        assert (movie.row, movie.ratings, alone.characters) == (alone.row, alone.ratings, [])
    scores = Counter(score for movie in whole for _, score in movie.ratings)
    assert len(scores) > 5
    for movie in whole:
        assert len({user for user, _ in movie.ratings}) == len(movie.ratings)
        assert all(
            comment.replies_to is None or comment.replies_to < place for place, comment in enumerate(movie.comments)
        )
    # The scores are near the rating of the user who listed the movie.
    rated = [
        (Fraction(sum(score for _, score in m.ratings), len(m.ratings)), m.row["rating"]) for m in whole if m.ratings
    ]
    good, bad = [[mean for mean, rating in rated if test(rating)] for test in ((60).__lt__, (40).__gt__)]
    assert sum(good) / len(good) > sum(bad) / len(bad) + 1


def test_the_number_of_rows_tells_the_number_of_movies() -> None:
    for parts in ([], ["comments"], PARTS):
        plan = Plan(parts)
        for movies in range(45):
            rows = plan.rows_of(movies)
            assert plan.movies_in(rows) == movies
            assert plan.movies_in(rows + plan.count("comments", movies)) == movies
        assert plan.rows_of(plan.movies_in(1_000_000)) <= 1_000_000 < plan.rows_of(plan.movies_in(1_000_000) + 1)
