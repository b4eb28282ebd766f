"""Fixtures for both databases and buses. A test with `service` runs on SQLite + memory and on PostgreSQL + Redis."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
from sqlalchemy import delete

import models
from repository.engine import migrations
from repository.engine.database import Database
from tests.support import reaper
from tests.support.servers.pgbouncer import PgBouncer
from tests.support.servers.postgresql import PostgresServer
from tests.support.servers.redis import RedisServer
from tests.support.servers.server import MissingServer
from tests.support.service import Service

BACKENDS = ("sqlite", "postgres")
# The genres of the shared service, which any user may name in movies.
GENRES = ("Noir", "Thriller", "Drama", "Crime", "Comedy", "Western", "a,b")

# Fixtures that start a server. A test that uses none of them is marked `fast`. `make check` runs the fast tests.
SERVERS = {"backend", "own_postgres", "own_redis", "pgbouncer", "postgres", "redis", "small"}

reaper.start()


def pytest_itemcollected(item: pytest.Item) -> None:
    if isinstance(item, pytest.Function) and SERVERS.isdisjoint(item.fixturenames):
        item.add_marker(pytest.mark.fast)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that must run alone at the end, and let each process of the run begin with a long test.

    No other test then waits for a test that must run alone, nor does such a test wait for a long one.
    """
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)
    long = [item for item in items if item.get_closest_marker("long") is not None]
    others = [item for item in items if item not in long]
    # Each process begins with an equal share of the list.
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    for number, item in enumerate(long):
        others.insert(len(items) * (number % processes) // processes, item)
    items[:] = others


@pytest.fixture(autouse=True)
def its_share_of_the_machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Run each test marked `alone` while no other test runs, because other load would distort the times it measures.

    The other processes of the test run wait before their next test until the test that runs alone is over.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    shared = tmp_path_factory.getbasetemp().parent
    is_alone = request.node.get_closest_marker("alone") is not None
    # Every running test holds a shared lock on the file `room`. A test that must run alone first locks the file `door`,
    # so that no other test begins, and then waits for the exclusive lock on `room`.
    with (shared / "door").open("w") as door, (shared / "room").open("w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        if not is_alone:
            fcntl.flock(door, fcntl.LOCK_UN)
        fcntl.flock(room, fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH)
        yield


Server = TypeVar("Server", PgBouncer, PostgresServer, RedisServer)


def private(kind: Callable[[], Server]) -> Iterator[Server]:
    """Yield a new server, never one that already runs on this machine. Skip the test if its program is missing."""
    try:
        server = kind()
    except MissingServer as missing:
        pytest.skip(str(missing))
    with server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL shared by the tests that do not disturb it."""
    yield from private(PostgresServer)


@pytest.fixture(scope="session")
def redis() -> Iterator[RedisServer]:
    """A Redis shared by the tests that do not disturb it."""
    yield from private(RedisServer)


@pytest.fixture(scope="session")
def pgbouncer(postgres: PostgresServer) -> Iterator[PgBouncer]:
    """A PgBouncer in transaction mode, in front of the shared PostgreSQL."""
    yield from private(lambda: PgBouncer(postgres))


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL that the test may kill, freeze or restart."""
    yield from private(PostgresServer)


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A Redis that the test may kill, freeze or restart."""
    yield from private(RedisServer)


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@dataclass
class Places:
    """The URLs of the database and the bus of one service."""

    database_url: str
    broadcast_url: str


@pytest.fixture(scope="session")
def empty_places(
    backend: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Places]:
    """Return a function that creates a database without tables and returns its URL with that of the bus to use."""

    def make() -> Places:
        if backend == "sqlite":
            return Places(f"sqlite:///{tmp_path_factory.mktemp('database')}/marquee.db", "memory://")
        postgres: PostgresServer = request.getfixturevalue("postgres")
        redis: RedisServer = request.getfixturevalue("redis")
        url = postgres.create_database()
        # All databases of a Redis share its channels. Services hear other tests' services but ignore other epochs.
        return Places(url, redis.url)

    return make


@pytest.fixture(scope="session")
def new_places(
    request: pytest.FixtureRequest,
    empty_places: Callable[[], Places],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[], Places]:
    """Return a function like `empty_places`, for databases with all tables and no log.

    The databases are copies of one, because a copy takes a fraction of the time of the migrations. The start of a
    service, or `migrate`, gives each copy a log with an epoch of its own.
    """
    template = empty_places()
    asyncio.run(create_tables(template.database_url))

    def make() -> Places:
        if template.database_url.startswith("sqlite"):
            copy = tmp_path_factory.mktemp("database") / "marquee.db"
            shutil.copyfile(template.database_url.removeprefix("sqlite:///"), copy)
            return Places(f"sqlite:///{copy}", template.broadcast_url)
        postgres: PostgresServer = request.getfixturevalue("postgres")
        return Places(postgres.create_database(template.database_url.rpartition("/")[2]), template.broadcast_url)

    return make


async def create_tables(url: str) -> None:
    """Apply all migrations to an empty database, and remove the log's head, which holds the epoch."""
    database = Database(url)
    await migrations.migrate(database)
    async with database.begin() as (connection, _):
        await connection.execute(delete(models.event_head))
    await database.close()


@pytest.fixture(scope="session")
def service(empty_places: Callable[[], Places], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A running service for each backend, shared by the tests that only use it as clients do."""
    places = empty_places()
    with Service(places.database_url, places.broadcast_url, tmp_path_factory.mktemp("service")).running() as running:
        yield running.add_genres(*GENRES)


@pytest.fixture
def new_service(new_places: Callable[[], Places], tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Return a function that creates services without starting them, on a new database or on that of `places`."""
    made: list[Service] = []

    def make(places: Places | None = None, **settings: str) -> Service:
        where = places or new_places()
        made.append(Service(where.database_url, where.broadcast_url, tmp_path, **settings))
        return made[-1]

    yield make
    for each in made:
        each.kill()
    for each in made:
        each.check_log()


@pytest.fixture
async def database(new_places: Callable[[], Places]) -> AsyncIterator[Database]:
    """A migrated, empty database without a service."""
    database = Database(new_places().database_url)
    await migrations.migrate(database)
    yield database
    await database.close()
