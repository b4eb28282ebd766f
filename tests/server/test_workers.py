"""Several processes on one database: all watchers see every write in the same order, whatever the bus does."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.servers.postgresql import PostgresServer
from tests.support.servers.redis import RedisServer
from tests.support.service import Person, Service, Watcher, eventually, several_services
from tests.support.sockets import bulk_rows, crowd

WATCHERS_EACH = 50
FEW_EACH = 10  # for tests with faults, where the number of watchers does not matter
WRITES = 2_000
FEW_WRITES = 500
WRITERS_EACH = 8


@pytest.fixture
def two_servers(postgres: PostgresServer, own_redis: RedisServer, tmp_path: Path) -> Iterator[tuple[Service, ...]]:
    """Two server processes on one PostgreSQL and one Redis."""
    with several_services(2, postgres.create_database(), own_redis.url, tmp_path, LOG_LEVEL="warning") as services:
        yield services


movie_watchers = partial(crowd, query="topics=movies")


async def write_to(service: Service, person: Person, number: int) -> None:
    """Send adds, edits and deletes, `number` in total, and WRITERS_EACH at a time."""
    left = iter(range(number))
    async with httpx.AsyncClient(base_url=service.url, timeout=60, headers=person.bearer) as client:

        async def writer() -> None:
            own: list[int] = []
            for index in left:
                if index % 4 == 2 and own:
                    change = {"rating": index % 100 + 1, "title": f"edit {index}"}
                    answer = await client.patch(f"/movies/{own[-1]}", json=change)
                elif index % 4 == 3 and own:
                    answer = await client.delete(f"/movies/{own.pop()}")
                else:
                    answer = await client.post("/movies", json={"title": f"movie {index}"})
                    own.append(answer.json()["id"])
                assert answer.status_code < 300, answer.text

        await asyncio.gather(*(writer() for _ in range(WRITERS_EACH)))


async def write_to_all(services: tuple[Service, ...], person: Person, number: int) -> None:
    await asyncio.gather(*(write_to(service, person, number // len(services)) for service in services))


async def all_have_arrived(person: Person, watchers: list[Watcher]) -> int:
    """Wait until every watcher has seen a new event, forget all events so far, and return the number of the new one.

    The positions in the welcomes differ, because a worker may be a little behind when it sends a welcome.
    """
    marker = await person.add(title="all are here")
    seen = await asyncio.gather(*(watcher.until(lambda frame: frame.get("data") == marker) for watcher in watchers))
    for watcher in watchers:
        watcher.events.clear()
    return int(seen[0]["seq"])


async def all_see_the_same(watchers: list[Watcher], first: int, number: int, seconds: float = 60.0) -> None:
    expected = list(range(first, first + number))
    await asyncio.gather(*(watcher.until_seq(expected[-1], seconds) for watcher in watchers))
    reference = watchers[0].events
    for watcher in watchers:
        assert watcher.seqs == expected
        assert watcher.events == reference


async def scene(
    services: tuple[Service, ...],
    person: Person,
    watchers: list[Watcher],
    fault: Callable[[], Any] | None = None,
    writes: int = WRITES,
) -> None:
    """Write to all services concurrently, with a fault halfway; then assert that all watchers saw every write."""
    first = await all_have_arrived(person, watchers) + 1
    await write_to_all(services, person, writes // 2)
    await asyncio.gather(write_to_all(services, person, writes // 2), *([fault()] if fault is not None else []))
    await all_see_the_same(watchers, first, writes)


async def test_two_servers_show_all_watchers_the_same_order(two_servers: tuple[Service, ...]) -> None:
    async with two_servers[0].person() as alice, movie_watchers(WATCHERS_EACH, *two_servers) as watchers:
        await scene(two_servers, alice, watchers)


async def test_redis_killed_and_restarted_loses_nothing(
    two_servers: tuple[Service, ...], own_redis: RedisServer
) -> None:
    async def outage() -> None:
        with own_redis.down():
            await asyncio.sleep(1.0)  # the duration of the outage
        for service in two_servers:
            await eventually(partial(is_ready, service), "the service hears the bus again")

    async with two_servers[0].person() as alice, movie_watchers(FEW_EACH, *two_servers) as watchers:
        await scene(two_servers, alice, watchers, outage)
        movie = await alice.add(title="after the outage")
        for watcher in watchers:
            await watcher.sees(movie)


async def is_ready(service: Service) -> bool:
    async with service.anyone() as client:
        return bool((await client.get("/readyz")).json()["status"] == "ready")


async def test_redis_frozen_for_five_seconds_loses_nothing_and_delays_no_client(
    two_servers: tuple[Service, ...], own_redis: RedisServer
) -> None:
    async with two_servers[0].person() as alice, movie_watchers(FEW_EACH, *two_servers) as watchers:

        async def outage() -> None:
            with own_redis.frozen():
                async with two_servers[0].anyone() as client, two_servers[1].watch() as latecomer:

                    async def is_silent() -> bool:
                        answer = await client.get("/readyz")
                        return answer.status_code == 200 and answer.json()["checks"]["bus"] != "ok"

                    await eventually(is_silent, "readiness reports that the bus is silent")
                    movie = await alice.add("characters", name="sent while Redis is frozen")
                    await latecomer.until(lambda frame: frame.get("data") == movie)  # Redis is still frozen
                    await asyncio.sleep(2.5)  # extend the outage to five seconds in total

        first = await all_have_arrived(alice, watchers) + 1
        await write_to_all(two_servers, alice, WRITES // 2)
        await asyncio.gather(write_to_all(two_servers, alice, WRITES // 2), outage())
        last = await alice.add(title="the last")
        await asyncio.gather(*(watcher.until(lambda frame: frame.get("data") == last) for watcher in watchers))
        reference = watchers[0].events
        assert len(reference) == WRITES + 1
        assert watchers[0].seqs[0] == first
        assert watchers[0].seqs == sorted(set(watchers[0].seqs))
        assert all(watcher.events == reference for watcher in watchers)


async def test_the_service_starts_and_works_while_redis_is_down(
    postgres: PostgresServer, own_redis: RedisServer, tmp_path: Path
) -> None:
    own_redis.kill()
    service = Service(postgres.create_database(), own_redis.url, tmp_path)
    with service.running():
        async with service.person() as alice, service.watch() as watcher:
            await watcher.sees(await alice.add(), seconds=3)
            own_redis.start()
            await eventually(lambda: is_ready(service), "the bus is heard")
            await watcher.sees(await alice.add())


@pytest.mark.slow
async def test_two_servers_on_sqlite_need_no_redis(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    with several_services(2, url, "memory://", tmp_path, LOG_LEVEL="warning") as services:
        async with services[0].person() as alice, movie_watchers(FEW_EACH, *services) as watchers:
            await scene(services, alice, watchers, writes=FEW_WRITES)


async def test_two_servers_on_postgresql_need_no_redis(postgres: PostgresServer, tmp_path: Path) -> None:
    with several_services(2, postgres.create_database(), "memory://", tmp_path, LOG_LEVEL="warning") as (first, second):
        async with first.person() as alice, second.watch() as watcher:
            for _ in range(20):
                await watcher.sees(await alice.add(), seconds=2)


async def test_workers_of_one_server_share_everything(new_service: Callable[..., Service], tmp_path: Path) -> None:
    service = new_service(WORKERS="2", LOG_LEVEL="warning").start()
    async with service.person() as alice, movie_watchers(12, service) as watchers:
        first = await all_have_arrived(alice, watchers) + 1
        await write_to(service, alice, 200)
        await all_see_the_same(watchers, first, 200)
        job = await alice.generate("movies", 3000)
        for watcher in watchers:
            await bulk_rows(watcher, 3000)
        assert (await alice.job_ended(job["id"]))["state"] == "done"
    assert await asyncio.to_thread(service.stop) == 0


async def test_a_database_restart_loses_no_acknowledged_write(
    own_postgres: PostgresServer, own_redis: RedisServer, tmp_path: Path
) -> None:
    url = own_postgres.create_database()
    service = Service(url, own_redis.url, tmp_path, LOG_LEVEL="warning")
    with service.running():
        async with service.person() as alice, service.watch() as watcher:
            added = [(await alice.add(title=f"before {n}"))["id"] for n in range(20)]
            own_postgres.kill()
            refused = await alice.http.post("/movies", json={"title": "meanwhile"})
            assert refused.status_code == 503
            assert "Retry-After" in refused.headers
            async with service.anyone() as client:
                assert (await client.get("/readyz")).status_code == 503
                assert (await client.get("/healthz")).status_code == 200
            own_postgres.start()

            async def works() -> bool:
                answer = await alice.http.post("/movies", json={"title": "after"})
                if answer.status_code == 201:
                    added.append(answer.json()["id"])
                return answer.status_code == 201

            await eventually(works, "writes work again")
            await watcher.until(lambda frame: frame.get("data", {}).get("id") == added[-1])
            assert [event["data"]["id"] for event in watcher.events] == added
            assert watcher.seqs == list(range(watcher.seqs[0], watcher.seqs[0] + len(added)))


async def test_pubsub_connections_that_are_cut_come_back(
    two_servers: tuple[Service, ...], own_redis: RedisServer
) -> None:
    async with two_servers[0].person() as alice, two_servers[1].watch() as watcher:
        for number in range(10):
            reader, writer = await asyncio.open_connection("127.0.0.1", own_redis.port)
            writer.write(b"CLIENT KILL TYPE pubsub\r\n")
            await reader.readline()
            writer.close()
            await watcher.sees(await alice.add(title=f"cut {number}"), seconds=3)


async def test_a_worker_frozen_for_longer_than_its_lease_repeats_nothing(
    two_servers: tuple[Service, ...],
) -> None:
    """Another worker takes over the job, so the frozen worker's next chunk is rejected when it wakes up."""
    first, second = two_servers
    async with first.person() as alice, second.watch("topics=movies") as watcher:
        job = await alice.generate("movies", 9_000, "?rate=1000")
        await watcher.expect("add_bulk")
        os.kill(first.pid, signal.SIGSTOP)
        try:
            total = watcher.events[-1]["data"]["count"]
            while total < 6_000:
                total += (await watcher.expect("add_bulk"))["data"]["count"]
        finally:
            os.kill(first.pid, signal.SIGCONT)
        await bulk_rows(watcher, 9_000 - total)
        assert (await alice.job_ended(job["id"]))["done"] == 9_000
        ids = [row["id"] for event in watcher.events for row in event["data"]["items"]]
        assert len(set(ids)) == len(ids) == 9_000
