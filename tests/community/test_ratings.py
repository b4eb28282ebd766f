"""Ratings: one per user and movie, and the movie's average and count, which are exact after every event."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
from sqlalchemy import insert, text, update

import models
from core.errors import NotFound, Unauthenticated
from core.identity import Group, Identity
from core.times import utc_now
from repository.accounts import sessions
from repository.community import averages, ratings
from repository.engine import event_log
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic import dependants, rows, writes
from repository.generic.dependants import TooManyDependants
from resources.movies import MOVIES
from resources.ratings import average_of
from tests.conftest import Places
from tests.support import accounts
from tests.support.backends import POSTGRES_ONLY, SQLITE_ONLY
from tests.support.requests import assert_problem, ok
from tests.support.resources import links, locations, moderator, nothing_written, sql, watching
from tests.support.service import Person, Service, Watcher, eventually
from tests.support.sockets import rows_of, subscribed

Row = dict[str, Any]


async def rate(person: Person, movie: Row, score: int, status: int = 201) -> Row:
    found: Row = await ok(person.http.post(f"/movies/{movie['id']}/ratings", json={"score": score}), status)
    return found


async def expect_movie(watcher: Watcher, movie: Row, average: float | None, count: int, *changed: str) -> None:
    event = await watcher.expect("update", "movies")
    expected = movie | {"average_rating": average, "ratings_count": count}
    assert event["data"] == expected, "the version stays, too"
    assert event["changed"] == list(changed or ("average_rating", "ratings_count"))


async def test_watchers_see_each_rating_and_the_average_that_follows(service: Service) -> None:
    async with service.person() as alice, service.person() as bob, watching(service) as watcher:
        movie = await alice.add()
        await watcher.sees(movie)
        assert (movie["average_rating"], movie["ratings_count"]) == (None, 0)
        path = f"/movies/{movie['id']}/ratings"

        answer = await alice.http.post(path, json={"score": 7})
        assert answer.status_code == 201
        rating = answer.json()
        times = dict.fromkeys(("created_at", "updated_at"), rating["created_at"])
        keys = {"id": rating["id"], "movie_id": movie["id"], "user_id": alice.id, "version": 1}
        assert rating == {"score": 7, **keys, **times}
        assert answer.headers["location"] == f"/ratings/{rating['id']}"
        assert (await watcher.expect("add", "ratings"))["data"] == rating
        await expect_movie(watcher, movie, 7.0, 1)
        assert answer.headers["stream-position"].endswith(f":{watcher.seqs[-1]}")

        await rate(bob, movie, 8)
        await watcher.expect("add", "ratings")
        await expect_movie(watcher, movie, 7.5, 2)

        again = await alice.http.post(path, json={"score": 8})
        assert (again.status_code, again.headers["location"]) == (200, f"/ratings/{rating['id']}")
        assert again.json() == rating | {"score": 8, "version": 2, "updated_at": again.json()["updated_at"]}
        event = await watcher.expect("update", "ratings")
        assert (event["data"], event["changed"], event["actor_id"]) == (again.json(), ["score"], alice.id)
        await expect_movie(watcher, movie, 8.0, 2, "average_rating")

        async with nothing_written(service):  # the same score again
            assert await rate(alice, movie, 8, 200) == again.json()
        async with service.person() as carol:
            await rate(carol, movie, 8)
            await watcher.expect("add", "ratings")
            await expect_movie(watcher, movie, 8.0, 3, "ratings_count")
            assert (await carol.http.delete(f"{path}/mine")).status_code == 204
            await watcher.expect("delete", "ratings")
            await expect_movie(watcher, movie, 8.0, 2, "ratings_count")
        assert (await bob.http.delete(f"{path}/mine")).status_code == 204
        await watcher.expect("delete", "ratings")
        await expect_movie(watcher, movie, 8.0, 1, "ratings_count")
        assert (await alice.http.delete(f"/ratings/{rating['id']}")).status_code == 204
        assert (await watcher.expect("delete", "ratings"))["data"] == {"id": rating["id"]}
        await expect_movie(watcher, movie, None, 0)
        assert await ok(alice.http.get(f"/movies/{movie['id']}")) == movie


async def test_a_rating_is_read_and_changed_under_the_conventions_of_all_entities(service: Service) -> None:
    async with service.person() as alice, service.person() as bob, service.anyone() as reader:
        movie = await alice.add()
        path = f"/movies/{movie['id']}/ratings"
        first = await alice.http.post(path, json={"score": 3}, headers={"Idempotency-Key": "once"})
        again = await alice.http.post(path, json={"score": 3}, headers={"Idempotency-Key": "once"})
        assert (again.status_code, again.json()) == (201, first.json())
        assert again.headers["idempotency-replayed"] == "true"
        one = first.headers["location"]

        found = await reader.get(one)
        assert (found.json(), found.headers["etag"]) == (first.json(), first.headers["etag"])
        known = {"If-None-Match": found.headers["etag"]}
        assert (await reader.get(one, headers=known)).status_code == 304
        assert (await alice.http.get(f"{path}/mine", headers=known)).status_code == 304
        assert await ok(alice.http.get(f"{path}/mine?fields=score")) == {"score": 3}
        assert await ok(reader.get(f"{one}?fields=score,movie_id")) == {"score": 3, "movie_id": movie["id"]}

        merged = {"Content-Type": "application/merge-patch+json"}
        patched = await alice.http.patch(one, content=b'{"score": 4}', headers=merged)
        assert (patched.status_code, patched.json()["score"], patched.json()["version"]) == (200, 4, 2)
        replaced = await alice.http.put(one, json={"score": 5}, headers={"If-Match": patched.headers["etag"]})
        assert (replaced.status_code, replaced.json()["version"]) == (200, 3)
        assert (await ok(reader.get(f"/movies/{movie['id']}")))["average_rating"] == 5.0
        async with nothing_written(service):
            stale = {"If-Match": patched.headers["etag"]}
            for request in (
                alice.http.put(one, json={"score": 9}, headers=stale),
                alice.http.delete(one, headers=stale),
                alice.http.delete(f"{path}/mine", headers=stale),
            ):
                assert (await request).status_code == 412
            for request in (bob.http.patch(one, json={"score": 9}), bob.http.delete(one)):
                answer = await request
                assert_problem(answer, 403)
                assert answer.json()["detail"].startswith("Only the owner, moderators and admins may change rating")
            for request in (
                bob.http.get(f"{path}/mine"),
                bob.http.delete(f"{path}/mine"),
                bob.http.post(f"/movies/{2**40}/ratings", json={"score": 1}),
                reader.get(f"/movies/{2**40}/ratings"),
                reader.get(f"/movies/{2**40}/ratings/average"),
                bob.http.delete(f"/ratings/{2**40}"),
                bob.http.put(f"/ratings/{2**40}", json={"score": 1}),
            ):
                assert (await request).status_code == 404
            assert (await reader.post(path, json={"score": 1})).status_code == 401


async def test_staff_change_ratings_of_others_which_is_audited(service: Service) -> None:
    async with service.admin() as admin, service.person() as alice, moderator(service) as mona:
        movie = await alice.add()
        one = f"/ratings/{(await rate(alice, movie, 10))['id']}"
        async with watching(service, "topics=ratings,movies") as watcher:
            await ok(mona.http.patch(one, json={"score": 2}))
            assert (await watcher.expect("update", "ratings"))["actor_id"] == mona.id
            await expect_movie(watcher, movie, 2.0, 1, "average_rating")
            assert (await mona.http.delete(one)).status_code == 204
            await watcher.expect("delete", "ratings")
            await expect_movie(watcher, movie, None, 0)
        trail = await ok(admin.http.get(f"/admin/audit?actor_id={mona.id}&sort=id"))
        assert [(entry["action"], entry["resource"], entry["user_id"], entry["changes"]) for entry in trail] == [
            ("update", "ratings", alice.id, {"score": []}),
            ("delete", "ratings", alice.id, {}),
        ]


@SQLITE_ONLY
async def test_invalid_requests_name_every_problem(service: Service) -> None:
    async with service.person() as alice:
        movie = await alice.add()
        path = f"/movies/{movie['id']}/ratings"
        async with nothing_written(service):
            for score in (0, 11, -1, 7.5, "7", None, True, [7], 2**70):
                assert_problem(await alice.http.post(path, json={"score": score}), 422, ["body", "score"])
            answer = await alice.http.post("/movies/x/ratings?a=1", json={"scores": 7})
            assert sorted(locations(answer)) == sorted(
                [["path", "id"], ["query", "a"], ["body", "score"], ["body", "scores"]]
            )
            assert "Did you mean score?" in answer.text
            answer = await alice.http.get(f"{path}?score=x&sort=-scores&limit=-1&q=x&fields=x")
            assert {loc[1] for loc in locations(answer)} == {"score", "sort", "limit", "q", "fields"}
            for wrong in ("average_rating=x", "average_rating[gte]=1e16", "average_rating=", "average_rating=7,3"):
                assert_problem(await alice.http.get(f"/movies?{wrong}"), 422, ["query", wrong.partition("=")[0]])
        await rate(alice, movie, 7.0)  # type: ignore[arg-type]  # an integer in JSON Schema


async def test_the_ratings_of_a_movie_and_of_a_user_are_lists(service: Service) -> None:
    async with AsyncExitStack() as stack:
        people = [await stack.enter_async_context(service.person()) for _ in range(4)]
        movie, other = await people[0].add(), await people[0].add()
        given = [await rate(person, movie, score) for person, score in zip(people, (9, 2, 9, 10), strict=True)]
        elsewhere = await rate(people[0], other, 1)
        reader = await stack.enter_async_context(service.anyone())
        path = f"/movies/{movie['id']}/ratings"

        answer = await reader.get(path)
        assert (answer.json(), answer.headers["x-total-count"]) == (given, "4")
        assert answer.headers["stream-position"]
        for query, places in (
            ("score[gte]=9&sort=-score,-id", [3, 2, 0]),
            (f"user_id={people[1].id}", [1]),
            ('filter={"or":[{"score":2},{"score":10}]}', [1, 3]),
            ("sort=score&offset=1&limit=2", [0, 2]),
        ):
            assert await ok(reader.get(f"{path}?{query}")) == [given[place] for place in places], query
        walked, url = [], f"{path}?sort=-score&limit=1&fields=id"
        while url:
            page = await reader.get(url)
            walked += [row["id"] for row in page.json()]
            url = links(page).get("next", "")
        assert walked == [given[place]["id"] for place in (3, 0, 2, 1)]

        summed = await reader.get(f"{path}/average")
        histogram = {str(score): 0 for score in range(1, 11)} | {"2": 1, "9": 2, "10": 1}
        assert summed.json() == {"average": 7.5, "count": 4, "histogram": histogram}
        assert summed.headers["stream-position"] == answer.headers["stream-position"]
        unrated = await people[0].add()
        empty = {"average": None, "count": 0, "histogram": dict.fromkeys(histogram, 0)}
        assert await ok(reader.get(f"/movies/{unrated['id']}/ratings/average")) == empty
        assert await ok(reader.get(f"/movies/{unrated['id']}/ratings")) == []

        mine = await people[0].http.get("/ratings?sort=-id")
        assert (mine.json(), mine.headers["x-total-count"]) == ([elsewhere, given[0]], "2")
        assert await ok(people[0].http.get(f"/ratings?movie_id={movie['id']}&fields=score")) == [{"score": 9}]
        assert (await reader.get("/ratings")).status_code == 401


async def test_movies_are_sorted_and_filtered_by_their_ratings(service: Service) -> None:
    async with service.person() as alice, service.person() as bob, service.person() as carol:
        movies = [await alice.add() for _ in range(4)]
        for movie, scores in zip(movies, ((7, 8, 7), (10,), (), (7, 8)), strict=True):  # 7.3, 10, none, 7.5
            for person, score in zip((alice, bob, carol), scores, strict=False):
                await rate(person, movie, score)
        ids = [movie["id"] for movie in movies]
        base = f"/users/{alice.id}/movies?fields=id"
        for query, places in (
            ("sort=-average_rating", [1, 3, 0, 2]),
            ("sort=average_rating,id", [0, 3, 1, 2]),
            ("sort=-ratings_count", [0, 3, 1, 2]),
            ("average_rating=7.3", [0]),
            ("average_rating[ne]=7.3", [1, 2, 3]),
            ("average_rating[in]=7.3,1e1", [0, 1]),
            ("average_rating[gt]=7.3", [1, 3]),
            ("average_rating[lte]=7.5", [0, 3]),
            ("ratings_count[gte]=2", [0, 3]),
            ('filter={"average_rating":{"gte":7.25,"lt":10}}', [0, 3]),
        ):
            assert await ok(alice.http.get(f"{base}&{query}")) == [{"id": ids[place]} for place in places], query
        for sort in ("-average_rating", "average_rating", "ratings_count,-average_rating"):
            whole = await ok(alice.http.get(f"{base}&sort={sort}"))
            walked, url = [], f"{base}&sort={sort}&limit=1"
            while url:
                page = await alice.http.get(url)
                walked += page.json()
                url = links(page).get("next", "")
            assert walked == whole, sort


async def test_subscriptions_filter_ratings_and_averages(service: Service) -> None:
    async with service.person() as alice, service.person() as bob, service.watch() as watcher:
        movie, other = await alice.add(), await alice.add()
        hers = await rate(alice, movie, 6)
        await rate(alice, other, 6)
        await subscribed(watcher, topics=["ratings"], filter={"movie_id": movie["id"]}, snapshot=True)
        assert await rows_of(watcher, "ratings") == [hers]
        his = await rate(bob, other, 9)
        his = await rate(bob, movie, 9)
        await watcher.sees(his)
        position = f"{watcher.welcome['data']['epoch']}:{watcher.events[-1]['seq']}"
        await rate(bob, movie, 1, 200)
        assert (await watcher.expect("update", "ratings"))["data"]["id"] == his["id"]
        async with service.watch() as resumed, service.watch() as good:
            await subscribed(resumed, topics=["ratings"], filter={"movie_id": movie["id"]}, since=position)
            assert (await resumed.expect("update", "ratings"))["data"]["score"] == 1
            wanted = {"user_id": alice.id, "average_rating": {"gte": 7.45}}
            await subscribed(good, topics=["movies"], filter=wanted, snapshot=True)
            assert [row["id"] for row in await rows_of(good)] == [other["id"]]
            await rate(bob, movie, 9, 200)  # 7.5 again
            assert (await good.expect("add", "movies"))["data"]["average_rating"] == 7.5
            await rate(alice, movie, 5, 200)
            gone = await good.expect("delete", "movies")
            assert (gone["data"], gone["reason"]) == ({"id": movie["id"]}, "filter")


async def test_a_deleted_movie_takes_its_ratings_along(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        movies = [await alice.add() for _ in range(3)]
        first, second = await rate(alice, movies[0], 6), await rate(bob, movies[0], 8)
        others = [await rate(bob, movie, 3) for movie in movies[1:]]
        async with watching(service, "topics=ratings,movies") as watcher:
            assert (await alice.http.delete(f"/movies/{movies[0]['id']}")).status_code == 204
            event = await watcher.expect("delete_bulk", "ratings")
            assert event["data"] == {"count": 2, "ids": [first["id"], second["id"]]}
            assert (await watcher.expect("delete", "movies"))["data"] == {"id": movies[0]["id"]}
            await alice.delete_bulk([movie["id"] for movie in movies[1:]])
            event = await watcher.expect("delete_bulk", "ratings")
            assert event["data"]["ids"] == [rating["id"] for rating in others]
            await watcher.expect("delete_bulk", "movies")
        assert await ok(bob.http.get("/ratings")) == []
        assert (await bob.http.get(f"/ratings/{first['id']}")).status_code == 404


async def test_ratings_outlive_the_account_that_gave_them(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        movie = await alice.add()
        rating = await rate(bob, movie, 4)
        assert (await bob.http.delete("/users/me")).status_code == 204
        assert await ok(alice.http.get(f"/movies/{movie['id']}/ratings")) == [rating]
        assert (await ok(alice.http.get(f"/movies/{movie['id']}")))["average_rating"] == 4.0


# --- exactness


async def test_the_average_is_exact_after_every_event_while_fifty_users_vote(
    new_places: Callable[[], Places], new_service: Callable[..., Service]
) -> None:
    places = new_places()
    services = [new_service(places).start() for _ in range(2)]
    async with AsyncExitStack() as stack:
        people = [await stack.enter_async_context(services[n % 2].person(f"voter{n}")) for n in range(50)]
        movie = await people[0].add()
        watcher = await stack.enter_async_context(services[0].watch("topics=movies,ratings"))
        path = f"/movies/{movie['id']}/ratings"
        chance = random.Random(50)
        plans = [[chance.randint(1, 10) for _ in range(3)] for _ in people]

        async def vote(person: Person, scores: list[int]) -> None:
            for score in scores:
                answer = await person.http.post(path, json={"score": score})
                assert answer.status_code in (200, 201), answer.text
            if scores[0] < 4:
                assert (await person.http.delete(f"{path}/mine")).status_code == 204

        await asyncio.gather(*(vote(person, plan) for person, plan in zip(people, plans, strict=True)))
        left = [plan[-1] for plan in plans if plan[0] >= 4]
        movie = await ok(people[0].http.get(f"/movies/{movie['id']}"))
        assert (movie["average_rating"], movie["ratings_count"]) == (average_of(sum(left), len(left)), len(left))
        summed = await people[1].http.get(f"{path}/average")
        assert (summed.json()["average"], summed.json()["count"]) == (movie["average_rating"], len(left))
        stored = await sql(services[0], "SELECT count(*), sum(score) FROM ratings")
        assert [tuple(map(int, stored[0]))] == [(len(left), sum(left))]

        await watcher.until_seq(int(summed.headers["stream-position"].rpartition(":")[2]))
        scores: dict[int, int] = {}
        shown: tuple[float | None, int] = (None, 0)
        for place, event in enumerate(watcher.events):
            data = event["data"]
            if event["topic"] == "movies":
                shown = data["average_rating"], data["ratings_count"]
            elif event["operation"] == "delete":
                del scores[data["id"]]
            else:
                assert (event["operation"] == "add") == (data["id"] not in scores)
                scores[data["id"]] = data["score"]
            # A change of the average comes right after the rating that causes it.
            following = watcher.events[place + 1]["topic"] if place + 1 < len(watcher.events) else "ratings"
            if following == "ratings":
                assert shown == (average_of(sum(scores.values()), len(scores)), len(scores)), event
        assert list(scores.values()).count(10) == left.count(10)


def test_averages_are_rounded_half_up() -> None:
    for count in range(1, 120):
        for total in range(count, 10 * count + 1, 7):
            tenths = (Fraction(total, count) * 10 + Fraction(1, 2)).__floor__()
            assert average_of(total, count) == float(Fraction(tenths, 10))
    assert [average_of(*pair) for pair in ((29, 4), (1, 1), (0, 0))] == [7.3, 1.0, None]


async def a_movie(tx: Transaction, **columns: Any) -> Row:
    stored = await writes.store(tx, MOVIES, [{"title": "M", "languages": [], "genres": []}], None)
    movie = (await tx.connection.execute(text("SELECT max(id) FROM movies"))).scalar_one()
    assert stored
    if columns:
        await tx.connection.execute(update(models.movies).where(models.movies.c.id == movie).values(columns))
    return {"id": movie}


async def test_the_database_and_python_compute_the_same_averages(database: Database) -> None:
    chance = random.Random(7)

    async def work(tx: Transaction) -> None:
        for _ in range(200):
            count = chance.choice((0, 1, 2, 3, 7, chance.randrange(40), chance.randrange(10**6)))
            total = chance.randint(count, 10 * count)
            movie = await a_movie(tx, ratings_sum=total, ratings_count=count)
            score = chance.randint(1, 10)
            tx.drafts.clear()
            await averages.follow(tx, (), [{"movie_id": movie["id"], "score": score}], None)
            query = f"SELECT average_rating, ratings_count, ratings_sum FROM movies WHERE id = {movie['id']}"
            found = (await tx.connection.execute(text(query))).one()
            assert tuple(found) == (average_of(total + score, count + 1), count + 1, total + score)

    await database.write(work)


async def test_several_votes_in_one_transaction_make_one_update_of_each_movie(database: Database) -> None:
    async def work(tx: Transaction) -> list[tuple[str, int, tuple[str, ...]]]:
        one, two, three = [(await a_movie(tx))["id"] for _ in range(3)]
        tx.drafts.clear()
        await averages.follow(tx, (), [{"movie_id": one, "score": score} for score in (1, 2, 2)], None)
        given = [{"movie_id": movie, "score": 5} for movie in (three, two, two)]
        await averages.follow(tx, (), given, None)
        moved = {"movie_id": one, "score": 2}
        await averages.follow(tx, [moved, moved], [moved, moved], None)
        return [(draft.operation, draft.payload.count(b'"title"'), draft.changed) for draft in tx.drafts]

    changed = ("average_rating", "ratings_count")
    assert await database.write(work) == [("update", 1, changed), ("update_bulk", 2, changed)]


async def test_a_vote_of_a_user_whose_session_has_ended_is_refused(database: Database) -> None:
    user_id = await accounts.account(database, "holly")
    session_id, now = "0b5f7f1e-8f53-4a0e-9e1f-1f6a3c0d2b4c", utc_now()

    async def begin(tx: Transaction) -> int:
        values = {"id": session_id, "user_id": user_id, "created_at": now, "expires_at": now, "last_used_at": now}
        await tx.connection.execute(insert(models.sessions).values(values))
        return int((await a_movie(tx))["id"])

    movie_id = await database.write(begin)
    identity = Identity(user_id, Group.USER, time.time() + 60, session_id, "holly")

    async def vote(score: int) -> Any:
        async def work(tx: Transaction) -> None:
            await ratings.vote(tx, identity, movie_id, score, requires_watched=False)

        return await accounts.outcome(database.write(work, identity))

    assert await vote(7) is None
    await database.write(lambda tx: sessions.leave(tx, user_id, session_id))
    before = await event_log.head(database)
    assert [await vote(score) for score in (7, 8)] == [Unauthenticated, Unauthenticated]
    assert await event_log.head(database) == before


async def test_a_movie_with_too_many_ratings_is_not_deleted_at_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dependants, "MAX_DEPENDANTS", 2)
    voters = [await accounts.account(database, f"holly{number}") for number in range(3)]
    identity = Identity(voters[0], Group.ADMIN, time.time() + 60, "", "holly")

    async def work(tx: Transaction) -> None:
        movie = await a_movie(tx)
        for voter in voters:
            one = Identity(voter, Group.USER, time.time() + 60, "", None)
            await ratings.vote(tx, one, movie["id"], 5, requires_watched=False)
        await writes.remove(tx, MOVIES, identity, movie["id"], None)

    assert await accounts.outcome(database.write(work)) is TooManyDependants


@POSTGRES_ONLY
async def test_changing_a_rating_takes_turns_with_deleting_its_movie(database: Database) -> None:
    voter = await accounts.account(database, "holly")
    admin = Identity(voter, Group.ADMIN, time.time() + 60, "", "holly")
    runs: list[str] = []

    async def change(kind: str, movie: Row, rating_id: int) -> Any:
        async def work(tx: Transaction) -> None:
            runs.append(kind)
            if kind == "edit":
                await ratings.edit(tx, admin, rating_id, {"score": 6}, None, requires_watched=False)
            elif kind == "remove":
                await ratings.remove(tx, admin, rating_id, None)
            else:
                await ratings.remove_own(tx, admin, movie["id"], None)

        return await accounts.outcome(database.write(work))

    async def waits() -> bool:
        query = "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        return bool((await database.select(text(query)))[0][0])

    async def turns(kind: str) -> None:
        runs.clear()
        movie = await database.write(a_movie)
        vote = partial(ratings.vote, identity=admin, movie_id=movie["id"], score=5, requires_watched=False)
        rating_id = (await database.write(vote)).stored.id
        tasks: list[asyncio.Task[Any]] = []

        async def delete(tx: Transaction) -> None:
            runs.append("delete")
            await rows.fetch_locked(tx, MOVIES.table, [movie["id"]])
            tasks.append(asyncio.create_task(change(kind, movie, rating_id)))
            await eventually(waits, "the change of the rating waits")
            await writes.remove(tx, MOVIES, admin, movie["id"], None)

        await database.write(delete)
        assert await tasks[0] is NotFound
        assert runs == ["delete", kind], "no transaction ran into a deadlock"

    for kind in ("edit", "remove", "remove_own"):
        await turns(kind)
