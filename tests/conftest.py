"""Both databases and both buses: a test that takes `service` runs on SQLite + memory and on PostgreSQL + Redis."""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from repository.engine import migrations
from repository.engine.database import Database
from tests.support import reaper
from tests.support.servers import MissingServer, PostgresServer, RedisServer
from tests.support.service import Service

BACKENDS = ("sqlite", "postgres")

# What starts a server. The tests that use none of these are marked `fast`, and `make check` runs only them.
SERVERS = {"backend", "own_postgres", "own_redis", "postgres", "redis"}

reaper.start()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and SERVERS.isdisjoint(item.fixturenames):
            item.add_marker(pytest.mark.fast)


@pytest.fixture(autouse=True)
def its_share_of_the_machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Tests that hold a time which needs the whole machine are marked `alone`: the other processes of the run wait
    between two of their tests until it is over.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    shared = tmp_path_factory.getbasetemp().parent
    is_alone = request.node.get_closest_marker("alone") is not None
    # Who wants to be alone keeps the door shut while it waits for the others to come out.
    with (shared / "door").open("w") as door, (shared / "room").open("w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        if not is_alone:
            fcntl.flock(door, fcntl.LOCK_UN)
        fcntl.flock(room, fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH)
        yield


Server = TypeVar("Server", PostgresServer, RedisServer)


def private(kind: type[Server]) -> Iterator[Server]:
    """A server of our own, never the machine's."""
    try:
        server = kind()
    except MissingServer as missing:
        pytest.skip(str(missing))
    with server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL shared by the tests that do not hurt it."""
    yield from private(PostgresServer)


@pytest.fixture(scope="session")
def redis() -> Iterator[RedisServer]:
    """A Redis shared by the tests that do not hurt it."""
    yield from private(RedisServer)


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL that the test may hurt."""
    yield from private(PostgresServer)


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A Redis that the test may hurt."""
    yield from private(RedisServer)


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@dataclass
class Places:
    """Where a service of a test keeps its data."""

    database_url: str
    broadcast_url: str


@pytest.fixture(scope="session")
def new_places(
    backend: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Places]:
    """Makes an empty database, and says which bus goes with it."""

    def make() -> Places:
        if backend == "sqlite":
            return Places(f"sqlite:///{tmp_path_factory.mktemp('database')}/marquee.db", "memory://")
        postgres: PostgresServer = request.getfixturevalue("postgres")
        redis: RedisServer = request.getfixturevalue("redis")
        url = postgres.create_database()
        # Redis channels are shared by all its databases: services of two tests hear each other, and tell by the epoch.
        return Places(url, redis.url)

    return make


@pytest.fixture(scope="session")
def service(new_places: Callable[[], Places], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One running service a backend, shared by tests that only use it as its users do."""
    places = new_places()
    with Service(places.database_url, places.broadcast_url, tmp_path_factory.mktemp("service")).running() as running:
        yield running


@pytest.fixture
def new_service(new_places: Callable[[], Places], tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Makes services of the test's own, not yet started; with `places`, on a database that another one uses."""
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
    """An empty database, migrated, without a service."""
    database = Database(new_places().database_url)
    await migrations.migrate(database)
    yield database
    await database.close()
