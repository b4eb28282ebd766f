"""Renaming and deleting rows with very many dependants: jobs that survive a kill, and what watchers see meanwhile."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import orjson
import pytest
from sqlalchemy import Table, func, select, text

import models
from core.errors import ContentTooLarge
from core.identity import Group, Identity
from jobs.cascades import CascadeJob
from jobs.runner import Runner
from repository import cascades, jobs
from repository.community import comments, ratings, watchlist
from repository.engine import transaction
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic import dependants, rows, writes
from repository.generic.versions import Row
from repository.job_users import RightsLost
from repository.jobs import ClaimedJob, LeaseLost
from resources.actors import ACTORS
from resources.characters import CHARACTERS
from resources.comments import COMMENTS
from resources.countries import COUNTRIES
from resources.genres import GENRES
from resources.movies import MOVIES
from resources.ratings import average_of
from resources.registry import RESOURCES
from resources.resource import Resource
from tests.support import accounts
from tests.support.requests import assert_problem, ok
from tests.support.resources import links
from tests.support.served_here import served_here
from tests.support.service import DEADLINE_SECONDS, Service, Watcher, eventually
from tests.support.sockets import rows_of, subscribed


@pytest.fixture(autouse=True)
def small_transactions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dependants, "MAX_DEPENDANTS", 4)
    monkeypatch.setattr(cascades, "CHUNK_ROWS", 3)


async def user(database: Database, name: str, group: Group = Group.USER) -> Identity:
    return Identity(await accounts.account(database, name, group), group, time.time() + 600, "", name)


async def add(database: Database, resource: Resource, me: Identity, **fields: Any) -> dict[str, Any]:
    body = {**resource.defaults, **fields}
    stored = await database.write(lambda tx: writes.add(tx, resource, me, body))
    found: dict[str, Any] = orjson.loads(stored.body)
    return found


async def all_rows(database: Database, table: Table) -> list[dict[str, Any]]:
    return [rows.entity(row) for row in await database.select(select(table).order_by(table.c.id))]


async def total(database: Database, table: Table) -> int:
    return int((await database.select(select(func.count()).select_from(table)))[0][0])


async def require_events_of_all(database: Database) -> None:
    """Assert that the last event about each row shows the row as it is stored, as a watcher must."""
    for resource in RESOURCES:
        shown: dict[int, Any] = {}
        query = select(models.events).where(models.events.c.topic == resource.name).order_by(models.events.c.seq)
        for event in await database.select(query):
            data = orjson.loads(event.payload)
            if event.operation.startswith("delete"):
                for id_ in data.get("ids", [data.get("id")]):
                    shown.pop(id_, None)  # countries and languages exist from the start, without an event
            else:
                shown |= {row["id"]: row for row in data.get("items", [data])}
        stored = {row["id"]: row for row in await all_rows(database, resource.table)}
        visible = {id_: {name: stored[id_][name] for name in resource.columns} for id_ in shown}
        assert visible == shown, resource.name


async def claimed(database: Database, owner: str) -> ClaimedJob:
    job = await jobs.claim(database, owner)
    assert job is not None
    return job


async def let_leases_expire(database: Database) -> None:
    await database.write(lambda tx: tx.connection.execute(text("UPDATE jobs SET lease_until = 0")))


@asynccontextmanager
async def running(database: Database) -> AsyncIterator[None]:
    runner = Runner(database)
    task = asyncio.create_task(runner.run())
    yield
    runner.stop()
    await task


async def ended(database: Database, job_id: str) -> Row:
    async def has_ended() -> Row | None:
        job = await jobs.find(database, job_id)
        assert job is not None
        return job if job["state"] not in jobs.UNFINISHED else None

    found: Row = await eventually(has_ended, "the job ends")
    return found


async def rename(database: Database, me: Identity, resource: Resource, row_id: int, name: str) -> Row:
    """Rename a row, leave the rest to a job, and return the job."""
    made: list[Row] = []

    async def work(tx: Transaction) -> None:
        async def defer(number: int) -> None:
            made.append(await cascades.order_renaming(tx, resource, me, row_id, number, None, None))

        await writes.edit(tx, resource, me, row_id, {"name": name}, None, defer)

    await database.write(work)
    return made[0]


async def delete(database: Database, me: Identity, resource: Resource, row_id: int) -> Row:
    return await database.write(lambda tx: cascades.order_deletion(tx, resource, me, row_id, None, None, None))


async def add_noir(database: Database, me: Identity) -> Row:
    """Add a genre with eight movies, and return the genre."""
    noir = await add(database, GENRES, me, name="Noir")
    for number in range(8):
        await add(database, MOVIES, me, title=f"M {number}", genres=["Noir"])
    return noir


async def genres_of(database: Database) -> Counter[tuple[str, ...]]:
    return Counter(tuple(row["genres"]) for row in await all_rows(database, models.movies))


async def test_a_killed_renaming_continues_and_follows_a_second_one(database: Database) -> None:
    chief = await user(database, "chief", Group.ADMIN)
    noir = await add_noir(database, chief)
    job = await rename(database, chief, GENRES, noir["id"], "Film noir")
    assert (job["kind"], job["done"], job["total"]) == ("rename_genres", 0, 8)
    killed = CascadeJob(database, await claimed(database, "killed"), "killed")
    assert await killed.store() == 3
    assert await genres_of(database) == {("Film noir",): 3, ("Noir",): 5}
    await require_events_of_all(database)

    # The old name is free, and a movie that names it shows another genre.
    await add(database, MOVIES, chief, title="Other", genres=["Noir"])
    again = await rename(database, chief, GENRES, noir["id"], "Black")
    assert again["id"] == job["id"], "expected the unfinished job to start from the first movie again"
    await let_leases_expire(database)
    resumed = CascadeJob(database, await claimed(database, "resumed"), "resumed")
    await resumed.store()
    with pytest.raises(LeaseLost):
        await killed.store()
    while not resumed.is_done:
        await resumed.store()
    assert await genres_of(database) == {("Black",): 8, ("Noir",): 1}
    found = await all_rows(database, models.movies)
    assert [row["version"] for row in found] == [3, 3, 3, 2, 2, 2, 2, 2, 1]
    assert {row["name"]: row["movies_count"] for row in await all_rows(database, models.genres)} == {
        "Black": 8,
        "Noir": 1,
    }
    await require_events_of_all(database)
    done = await jobs.find(database, job["id"])
    assert done is not None
    assert (done["state"], done["done"], done["total"]) == ("done", 8, 8)


async def popular_movie(database: Database, chief: Identity) -> tuple[int, int]:
    """Add a movie with dependants of all kinds, and return its id and their number."""
    movie = await add(database, MOVIES, chief, title="The Third Man", country="GB", languages=["English"])
    id_ = int(movie["id"])
    for number in range(5):
        await add(database, CHARACTERS, chief, name=f"C {number}", movie_id=id_)
    users = [await user(database, f"holly{number}") for number in range(5)]
    for place, each in enumerate(users):
        await database.write(
            partial(ratings.vote, identity=each, movie_id=id_, score=3 + place, requires_watched=False)
        )
        await database.write(partial(watchlist.add, identity=each, fields={"movie_id": id_, "status": "planned"}))
    # A deleted comment with a last reply, and another deleted comment above it that has more replies.
    thread = [(await database.write(lambda tx: comments.add(tx, users[0], id_, "Zither!"))).id]
    for above in (0, 0, 2, 0, 1):
        reply = partial(comments.reply, identity=users[1], comment_id=thread[above], text="Indeed.")
        thread.append((await database.write(reply)).id)
    await database.write(lambda tx: comments.remove_bulk(tx, chief, [thread[0], thread[2]]))
    return id_, 5 + 5 + 5 + len(thread)


async def require_exact_counts(database: Database) -> None:
    (movie,) = await all_rows(database, models.movies)
    scores = [row["score"] for row in await all_rows(database, models.ratings)]
    replies = Counter(row["parent_id"] for row in await all_rows(database, models.comments))
    assert movie["characters_count"] == sum(
        row["movie_id"] is not None for row in await all_rows(database, models.characters)
    )
    assert movie["comments_count"] == replies.total()
    assert (movie["average_rating"], movie["ratings_count"]) == (average_of(sum(scores), len(scores)), len(scores))
    for row in await all_rows(database, COMMENTS.table):
        assert row["replies_count"] == replies[row["id"]]
        assert row["replies_count"] or not row["deleted"], "a deleted comment keeps its place only for its replies"


async def test_a_killed_deletion_of_a_movie_continues(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comments, "MAX_ABOVE", 2 * comments.MAX_DEPTH)  # two comments at a time
    chief = await user(database, "chief", Group.ADMIN)
    movie_id, number = await popular_movie(database, chief)
    job = await delete(database, chief, MOVIES, movie_id)
    assert (job["kind"], job["total"]) == ("delete_movies", number + 1)
    assert (await delete(database, chief, MOVIES, movie_id))["id"] == job["id"]
    worker = CascadeJob(database, await claimed(database, "first"), "first")
    chunks = 0
    while not worker.is_done:
        await worker.store()
        chunks += 1
        if not worker.is_done:
            await require_exact_counts(database)
        await require_events_of_all(database)
        if chunks % 3 == 0 and not worker.is_done:  # a kill, after which another worker continues
            await let_leases_expire(database)
            worker = CascadeJob(database, await claimed(database, str(chunks)), str(chunks))
    assert chunks > 5
    for table in (models.movies, models.comments, models.ratings, models.watchlist, models.movie_languages):
        assert await total(database, table) == 0, table.name
    assert [row["movie_id"] for row in await all_rows(database, models.characters)] == [None] * 5
    counted = [(row["code"], row["movies_count"]) for row in await all_rows(database, models.countries)]
    assert not any(number for _, number in counted)


@pytest.mark.parametrize("resource", [GENRES, ACTORS, COUNTRIES], ids=lambda each: each.name)
async def test_a_deleted_row_leaves_all_rows_that_show_it(database: Database, resource: Resource) -> None:
    chief = await user(database, "chief", Group.ADMIN)
    fields = {"genres": ["Noir"], "actors": ["Alida Valli"], "country": "AT"}
    for number in range(8):
        movie = await add(database, MOVIES, chief, title=f"M {number}", **fields)
    ((row_id,),) = await database.select(select(resource.table.c.id).where(resource.table.c.movies_count == 8))
    if resource is ACTORS:
        for number in range(5):
            await add(database, CHARACTERS, chief, name=f"C {number}", movie_id=movie["id"], actor_id=row_id)
    job = await delete(database, chief, resource, row_id)
    async with running(database):
        done = await ended(database, job["id"])
    assert (done["state"], done["done"], done["error"]) == ("done", done["total"], None)
    column = {"genres": "genres", "actors": "actors", "countries": "country"}[resource.name]
    assert {str(row[column]) for row in await all_rows(database, models.movies)} <= {"None", "[]"}
    assert {row["actor_id"] for row in await all_rows(database, models.characters)} <= {None}
    assert await database.select(select(resource.table.c.id).where(resource.table.c.id == row_id)) == []
    await require_events_of_all(database)


async def test_a_deletion_stops_when_its_user_loses_the_rights_but_a_renaming_is_completed(database: Database) -> None:
    chief, mona = await user(database, "chief", Group.ADMIN), await user(database, "mona", Group.MODERATOR)
    noir, war = await add(database, GENRES, chief, name="Noir"), await add(database, GENRES, chief, name="War")
    for number in range(8):
        await add(database, MOVIES, chief, title=f"M {number}", genres=["Noir", "War"])
    renaming = await rename(database, mona, GENRES, war["id"], "At war")
    deletion = await delete(database, mona, GENRES, noir["id"])
    for owner in ("one", "two"):
        await CascadeJob(database, await claimed(database, owner), owner).store()
    users = models.users
    await database.write(
        lambda tx: tx.connection.execute(users.update().where(users.c.id == mona.user_id).values(group="user"))
    )
    await database.write(lambda tx: jobs.cancel_all(tx, mona.user_id))
    assert (await ended(database, deletion["id"]))["state"] == "cancelled"
    deletion = await delete(database, chief, GENRES, noir["id"])
    await database.write(
        lambda tx: tx.connection.execute(users.update().where(users.c.id == chief.user_id).values(is_active=False))
    )
    await let_leases_expire(database)
    async with running(database):
        renamed, stopped = await ended(database, renaming["id"]), await ended(database, deletion["id"])
    assert renamed["state"] == "done"
    assert (stopped["state"], stopped["error"]) == ("failed", "The account of the user was deleted or deactivated")
    assert await genres_of(database) == {("At war",): 3, ("Noir", "At war"): 5}
    await require_events_of_all(database)


async def test_rows_that_are_too_long_for_a_chunk_are_changed_in_smaller_ones(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    chief = await user(database, "chief", Group.ADMIN)
    noir = await add(database, GENRES, chief, name="Noir")
    for number in range(7):
        await add(database, MOVIES, chief, title=f"M {number}", description="x" * 10_000, genres=["Noir"])
    monkeypatch.setattr(transaction, "MAX_TRANSACTION_BYTES", 25_000)
    with pytest.raises(ContentTooLarge):
        await database.write(lambda tx: writes.remove_bulk(tx, MOVIES, chief, [1, 2, 3]))
    for job in (
        await rename(database, chief, GENRES, noir["id"], "Film noir"),
        await delete(database, chief, GENRES, noir["id"]),
    ):
        async with running(database):
            assert (await ended(database, job["id"]))["state"] == "done"
    assert await genres_of(database) == {(): 7}
    await require_events_of_all(database)


# --- over HTTP and on sockets


def apply(frame: dict[str, Any], view: dict[int, Any]) -> None:
    """Apply a frame of a subscription with a snapshot to the rows of a view."""
    operation, data = frame["operation"], frame["data"]
    if operation.startswith("delete"):
        for id_ in data.get("ids", [data.get("id")]):
            del view[id_]
    elif operation != "progress":
        view.update({row["id"]: row for row in data.get("items", [data])})


async def follow(watcher: Watcher, views: dict[str, Any], expected: dict[str, Any]) -> None:
    """Apply frames to the views of the subscriptions until the views are as expected."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while views != expected:
            frame = await watcher.next()
            if "subscription" in frame:
                apply(frame, views[frame["subscription"]])


async def test_watchers_of_the_old_and_the_new_name_end_with_what_is_stored(
    new_service: Callable[..., Service],
) -> None:
    service = new_service(RATE_LIMITS="off")
    async with served_here(service), service.admin() as chief, service.watch() as watcher:
        noir = await ok(chief.http.post("/genres", json={"name": "Noir"}), 201)
        movies = await chief.add_bulk([{"title": f"M {n}", "genres": ["Noir"]} for n in range(11)])
        names = {"old": "Noir", "new": "Film noir", "newest": "Black"}
        views: dict[str, dict[int, Any]] = {}
        for each, name in names.items():
            await subscribed(watcher, topics=["movies"], filter={"genre": name}, snapshot=True, **{"as": each})
            views[each] = {row["id"]: row for row in await rows_of(watcher)}
        path = f"/genres/{noir['id']}"
        answer = await chief.http.patch(path, json={"name": "Film noir"})
        assert (answer.status_code, answer.json()["name"]) == (200, "Film noir")
        (job_id,) = re.findall("^/jobs/(.+)$", links(answer)["status"])
        await ok(chief.http.patch(path, json={"name": "Black"}))
        assert (await chief.job_ended(job_id))["state"] == "done"

        late = await chief.add(title="Late", genres=["Black"])
        expected: dict[str, dict[int, Any]] = {}
        for each, name in names.items():
            stored = await ok(chief.http.get("/movies", params={"genre": name, "limit": 100}))
            expected[each] = {row["id"]: row for row in stored}
        assert [*map(len, expected.values())] == [0, 0, 12]
        assert expected["newest"].keys() == {late["id"], *(row["id"] for row in movies)}
        await follow(watcher, views, expected)

        # A bulk operation is rejected and says what to do; a single deletion becomes a job.
        for method, where, body in (
            ("PATCH", "/genres/bulk", [{"id": noir["id"], "name": "Noir"}]),
            ("DELETE", "/genres/bulk", {"ids": [noir["id"]]}),
        ):
            refused = await chief.http.request(method, where, json=body)
            assert_problem(refused, 409)
            assert f"{method} /genres/{{id}}" in refused.json()["detail"]
        answer = await chief.http.delete(path)
        assert (answer.status_code, answer.json()["kind"]) == (202, "delete_genres")
        assert answer.headers["Location"] == f"/jobs/{answer.json()['id']}"
        assert (await chief.job_ended(answer.json()["id"]))["state"] == "done"
        assert (await chief.http.get(path)).status_code == 404
        assert await ok(chief.http.get("/movies/count?genre=Black")) == {"count": 0}


async def test_a_renaming_is_not_cancelled_and_a_cancelled_deletion_keeps_the_row(database: Database) -> None:
    chief = await user(database, "chief", Group.ADMIN)
    noir = await add_noir(database, chief)
    renaming = await rename(database, chief, GENRES, noir["id"], "Film noir")
    refused = await accounts.outcome(database.write(lambda tx: jobs.cancel(tx, chief, renaming["id"])))
    assert refused.__name__ == "Conflict"
    async with running(database):
        await ended(database, renaming["id"])
    deletion = await delete(database, chief, GENRES, noir["id"])
    worker = CascadeJob(database, await claimed(database, "one"), "one")
    await worker.store()
    await database.write(lambda tx: jobs.cancel(tx, chief, deletion["id"]))
    with pytest.raises(LeaseLost):
        await worker.store()
    (kept,) = await all_rows(database, models.genres)
    assert (kept["name"], kept["movies_count"]) == ("Film noir", 5)
    assert await genres_of(database) == {("Film noir",): 5, (): 3}


async def test_the_rights_of_a_deletion_are_checked_in_each_chunk(database: Database) -> None:
    owner = await user(database, "owner")
    movie_id, _ = await popular_movie(database, await user(database, "chief", Group.ADMIN))
    assert (await accounts.outcome(delete(database, owner, MOVIES, movie_id))).__name__ == "Forbidden"
    mona = await user(database, "mona", Group.MODERATOR)
    await delete(database, mona, MOVIES, movie_id)
    worker = CascadeJob(database, await claimed(database, "one"), "one")
    await worker.store()
    await accounts.delete(database, mona.user_id)
    with pytest.raises((LeaseLost, RightsLost)):
        await worker.store()
    await require_exact_counts(database)
