"""Movies and characters as test cases, so that a test can run with both; and direct SQL."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
import httpx
import pytest

from tests.support.service import DEADLINE_SECONDS, Person, Service, Watcher


@dataclass(frozen=True)
class ResourceCase:
    """A resource under test. `label` is its required field; `full` has every field that clients write."""

    name: str
    singular: str
    label: str
    full: dict[str, Any]
    defaults: dict[str, Any]

    @property
    def path(self) -> str:
        return f"/{self.name}"

    def fields(self, label: str, **more: Any) -> dict[str, Any]:
        return {self.label: label, **more}


MOVIES = ResourceCase(
    "movies",
    "movie",
    "title",
    {
        "title": "Le Troisième Homme",
        "description": "A writer looks for a friend in Vienna.",
        "release_date": "1949-09-01",
        "rating": 93,
        "duration_minutes": 104,
        "status": "released",
        "budget": 0,
        "revenue": 2**53 - 1,
        "country": "GB",
        "languages": ["English", "German"],
        "genres": ["Noir", "Thriller"],
        "actors": [],
    },
    {
        "description": None,
        "release_date": None,
        "rating": None,
        "duration_minutes": None,
        "status": None,
        "budget": None,
        "revenue": None,
        "country": None,
        "languages": [],
        "genres": [],
        "actors": [],
    },
)
CHARACTERS = ResourceCase(
    "characters",
    "character",
    "name",
    {"name": "Harry Lime", "description": "Sells penicillin.", "movie_id": None, "actor_id": None},
    {"description": None, "movie_id": None, "actor_id": None},
)
TIME = re.compile(r"^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$")
BOTH = pytest.mark.parametrize("kind", [MOVIES, CHARACTERS], ids=lambda kind: kind.name)


def derived(kind: ResourceCase) -> dict[str, Any]:
    counts = {"characters_count": 0, "comments_count": 0, "average_rating": None, "ratings_count": 0}
    return counts if kind is MOVIES else {}


def as_added(kind: ResourceCase, given: dict[str, Any], row: dict[str, Any], owner: Person) -> dict[str, Any]:
    """Return the row expected after adding `given`; only the id and the times are taken from the actual `row`."""
    times = dict.fromkeys(("created_at", "updated_at"), row["created_at"])
    return {**kind.defaults, **given, **derived(kind), "id": row["id"], "user_id": owner.id, "version": 1, **times}


async def expect_event(
    watcher: Watcher, operation: str, kind: ResourceCase, data: Any, actor: Person, changed: list[str] | None = None
) -> None:
    """Assert that the next frame is exactly this event, with the sequence number after the last event's."""
    last = watcher.events[-1]["seq"] if watcher.events else watcher.welcome["data"]["seq"]
    event = await watcher.next()
    wanted = {"operation": operation, "topic": kind.name, "seq": last + 1, "data": data, "actor_id": actor.id}
    assert event == {**wanted, "ts": event["ts"]} | ({"changed": changed} if changed is not None else {})
    assert TIME.match(event["ts"])


async def sql(service: Service, statement: str) -> list[tuple[Any, ...]]:
    """Run one statement directly on the service's database, and return its rows."""
    if service.database_url.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(service.database_url.removeprefix("sqlite:///"), timeout=30)) as file:
            with file:
                return [tuple(row) for row in file.execute(statement).fetchall()]
    connection = await asyncpg.connect(service.database_url)
    try:
        return [tuple(row) for row in await connection.fetch(statement)]
    finally:
        await connection.close()


async def head(service: Service) -> int:
    """Return the number of the last event in the log."""
    found: int = (await sql(service, "SELECT seq FROM event_head"))[0][0]
    return found


async def contents(service: Service) -> tuple[Any, ...]:
    """Return values that a write would change: the head of the log, and a sum over the rows of each table."""
    counts = [
        f"(SELECT COALESCE(SUM({expression}), 0) FROM {table})"
        for table, expression in (
            ("movies", "id * version + characters_count + comments_count + ratings_count + ratings_sum"),
            ("comments", "id * version + replies_count"),
            ("characters", "id * version + COALESCE(movie_id, 0) + COALESCE(actor_id, 0)"),
            ("actors", "id * version + characters_count"),
            *((name, "id * version + movies_count") for name in ("genres", "actors", "countries", "languages")),
            ("movie_genres", "genre_id * movie_id"),
            ("movie_languages", "language_id * movie_id"),
            ("movie_actors", "actor_id * movie_id"),
            *((name, "id * version") for name in ("ratings", "watchlist", "users")),
            ("jobs", "1"),
            ("idempotency_keys", "1"),
        )
    ]
    return (await sql(service, f"SELECT (SELECT seq FROM event_head), {', '.join(counts)}"))[0]


@asynccontextmanager
async def nothing_written(service: Service) -> AsyncIterator[None]:
    """Assert that the block writes nothing, and that the service is ready after the block."""
    before = await contents(service)
    yield
    assert await contents(service) == before
    async with service.anyone() as client:
        assert (await client.get("/movies?limit=1")).status_code == 200
        assert (await client.get("/readyz")).json()["status"] == "ready"


@asynccontextmanager
async def watching(service: Service, query: str = "") -> AsyncIterator[Watcher]:
    """Open a watcher once the service has delivered the whole log, so that it receives only later events."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        async with service.watch(query) as watcher:
            if watcher.welcome["data"]["seq"] == await head(service):
                yield watcher
                return
    raise AssertionError("the service did not reach the head of its log")


@asynccontextmanager
async def moderator(service: Service) -> AsyncIterator[Person]:
    async with service.person() as person:
        await sql(service, f"UPDATE users SET \"group\" = 'moderator' WHERE id = {person.id}")
        yield person


def locations(answer: httpx.Response) -> list[list[Any]]:
    """Return the locations of a response's problems, and assert that each problem has the documented members."""
    problems = answer.json()["detail"]
    assert isinstance(problems, list), problems
    for problem in problems:
        assert set(problem) == {"loc", "msg", "type"}, problem
        assert problem["msg"]
        assert problem["type"]
    return [problem["loc"] for problem in problems]


def links(answer: httpx.Response) -> dict[str, str]:
    """Return the URLs of the `Link` header by relation."""
    return {name: link["url"] for name, link in answer.links.items() if name}
