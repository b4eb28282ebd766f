"""Movies and characters as the tests see them, so that every scene runs with both; and direct SQL."""

from __future__ import annotations

import contextlib
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
    """`label` is the field that must be there; `full` names every field an editor writes."""

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
    },
)
CHARACTERS = ResourceCase(
    "characters",
    "character",
    "name",
    {"name": "Harry Lime", "description": "Sells penicillin.", "movie_id": None},
    {"description": None, "movie_id": None},
)
BOTH = pytest.mark.parametrize("kind", [MOVIES, CHARACTERS], ids=lambda kind: kind.name)


def derived(kind: ResourceCase) -> dict[str, Any]:
    return {"characters_count": 0} if kind is MOVIES else {}


async def sql(service: Service, statement: str) -> list[tuple[Any, ...]]:
    """Run one statement on the service's database, behind its back."""
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
    """The number of the last event in the log: it stands still exactly when nothing was told."""
    found: int = (await sql(service, "SELECT seq FROM event_head"))[0][0]
    return found


async def contents(service: Service) -> tuple[Any, ...]:
    """What must not move when nothing is written: the log's head, and every row of the tables as a sum."""
    counts = [
        f"(SELECT COALESCE(SUM({expression}), 0) FROM {table})"
        for table, expression in (
            ("movies", "id * version + characters_count"),
            ("characters", "id * version + COALESCE(movie_id, 0)"),
            ("genres", "id * version"),
            ("users", "id * version"),
            ("jobs", "1"),
            ("idempotency_keys", "1"),
        )
    ]
    return (await sql(service, f"SELECT (SELECT seq FROM event_head), {', '.join(counts)}"))[0]


@asynccontextmanager
async def nothing_written(service: Service) -> AsyncIterator[None]:
    """What happens in the block leaves no trace, and the service answers after it."""
    before = await contents(service)
    yield
    assert await contents(service) == before
    async with service.anyone() as client:
        assert (await client.get("/movies?limit=1")).status_code == 200
        assert (await client.get("/readyz")).json()["status"] == "ready"


@asynccontextmanager
async def watching(service: Service, query: str = "") -> AsyncIterator[Watcher]:
    """A watcher whose next event is the next one written: the service has passed on all that is in the log."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        async with service.watch(query) as watcher:
            if watcher.welcome["data"]["seq"] == await head(service):
                yield watcher
                return
    raise AssertionError("the service does not reach the head of its log")


@asynccontextmanager
async def moderator(service: Service) -> AsyncIterator[Person]:
    async with service.person() as person:
        await sql(service, f"UPDATE users SET \"group\" = 'moderator' WHERE id = {person.id}")
        yield person


def locations(answer: httpx.Response) -> list[list[Any]]:
    """Where a 422 or a 409 finds fault. Checks the error's shape on the way."""
    problems = answer.json()["detail"]
    assert isinstance(problems, list), problems
    for problem in problems:
        assert set(problem) == {"loc", "msg", "type"}, problem
        assert problem["msg"]
        assert problem["type"]
    return [problem["loc"] for problem in problems]


def links(answer: httpx.Response) -> dict[str, str]:
    """The `Link` header as relation: address."""
    return {name: link["url"] for name, link in answer.links.items() if name}
