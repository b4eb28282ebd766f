"""A worker whose bus is silent, though its connection is open, still tells its watchers everything, and says so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from tests.support.proxies import Proxies, RedisProxy
from tests.support.servers import PostgresServer, RedisServer
from tests.support.service import Person, Service, Watcher, eventually

LATEST_SECONDS = 2.0
WATCHERS = 20
SILENT_SECONDS = 7.0  # past the point at which the worker gives up its connection and subscribes again
PAUSE_SECONDS = 0.05
LAST = "the last"


@pytest.fixture
def proxies() -> Iterator[Proxies]:
    with Proxies() as running:
        yield running


@pytest.fixture
def bus(proxies: Proxies, redis: RedisServer) -> RedisProxy:
    """What the worker under test takes for Redis."""
    return proxies.redis(redis.port)


@pytest.fixture
def workers(
    postgres: PostgresServer, redis: RedisServer, bus: RedisProxy, tmp_path: Path
) -> Iterator[tuple[Service, Service]]:
    """One with a good bus, and one behind the proxy."""
    url = postgres.create_database()
    good = Service(url, redis.url, tmp_path, LOG_LEVEL="warning")
    behind = Service(url, f"redis://127.0.0.1:{bus.port}/0", tmp_path, LOG_LEVEL="warning")
    with good.running(), behind.running():
        yield good, behind


async def status(client: httpx.AsyncClient, service: Service) -> str:
    """`ready`, or what the bus is said to be."""
    answer = await client.get(f"{service.url}/readyz")
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["checks"]["bus"]
    assert answer.json()["status"] == ("ready" if found == "ok" else "degraded")
    return "ready" if found == "ok" else found


async def turns(client: httpx.AsyncClient, service: Service, wanted: str, seconds: float) -> None:
    async def has_turned() -> bool:
        return wanted in await status(client, service)

    await eventually(has_turned, f"readiness says {wanted}", seconds)


async def deaf_workers(client: httpx.AsyncClient, service: Service) -> float:
    """What the metric says."""
    lines = (await client.get(f"{service.url}/metrics")).text.splitlines()
    return float(next(line for line in lines if line.startswith("marquee_bus_deaf ")).split()[1])


async def write_and_time(person: Person, written: dict[int, float]) -> None:
    ends_at = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < ends_at:
        movie = await person.add()
        written[movie["id"]] = time.monotonic()
        await asyncio.sleep(PAUSE_SECONDS)


async def time_arrivals(watcher: Watcher) -> dict[int, float]:
    arrived: dict[int, float] = {}
    frame: dict[str, Any] = {"data": {"title": None}}
    while frame["data"]["title"] != LAST:
        frame = await watcher.next(60.0)
        assert frame["data"]["id"] not in arrived, "each once"
        arrived[frame["data"]["id"]] = time.monotonic()
    return arrived


@pytest.mark.alone
async def test_watchers_of_a_deaf_worker_get_everything_within_two_seconds(
    workers: tuple[Service, Service], bus: RedisProxy
) -> None:
    good, deaf = workers
    async with AsyncExitStack() as stack:
        alice = await stack.enter_async_context(good.person())
        bob = await stack.enter_async_context(deaf.person())
        client = await stack.enter_async_context(httpx.AsyncClient())
        crowd = [await stack.enter_async_context(deaf.watch("topics=movies")) for _ in range(WATCHERS)]
        crowd.append(await stack.enter_async_context(good.watch("topics=movies")))
        await asyncio.gather(turns(client, deaf, "ready", 5.0), turns(client, good, "ready", 5.0))

        bus.is_silent = True
        written: dict[int, float] = {}
        reading = [asyncio.create_task(time_arrivals(watcher)) for watcher in crowd]
        await asyncio.gather(
            write_and_time(alice, written), write_and_time(bob, written), turns(client, deaf, "silent", 3.0)
        )
        assert "silent" in await status(client, deaf), "it stays deaf, whatever it tries"
        assert await status(client, good) == "ready"
        assert (await deaf_workers(client, deaf), await deaf_workers(client, good)) == (1, 0)
        assert bus.lost > 0
        last = await alice.add(title=LAST)
        written[last["id"]] = time.monotonic()
        arrivals = await asyncio.gather(*reading)
        lates = [arrived[id_] - answered for arrived in arrivals for id_, answered in written.items()]
        assert max(lates) < LATEST_SECONDS
        assert all(watcher.seqs == sorted(set(watcher.seqs)) for watcher in crowd)

        bus.is_silent = False
        await turns(client, deaf, "ready", 10.0)

        async def hears() -> bool:
            return await deaf_workers(client, deaf) == 0

        await eventually(hears, "the metric says so, too", 3.0)


@pytest.mark.alone
async def test_a_worker_that_was_deaf_from_the_start_serves(
    postgres: PostgresServer, redis: RedisServer, bus: RedisProxy, tmp_path: Path
) -> None:
    bus.is_silent = True
    url = postgres.create_database()
    good = Service(url, redis.url, tmp_path, LOG_LEVEL="warning")
    deaf = Service(url, f"redis://127.0.0.1:{bus.port}/0", tmp_path, LOG_LEVEL="warning")
    with good.running(), deaf.running():
        async with good.person() as alice, deaf.watch("topics=movies") as watcher, httpx.AsyncClient() as client:
            await turns(client, deaf, "silent", 5.0)
            for _ in range(10):
                movie = await alice.add()
                assert (await watcher.expect("add", seconds=LATEST_SECONDS))["data"] == movie


@pytest.mark.alone
async def test_the_proxy_loses_messages_and_nothing_else(redis: RedisServer, proxies: Proxies) -> None:
    for protocol in (2, 3):
        proxy = proxies.redis(redis.port, seed=7, drop=0.2)
        async with Redis(host="127.0.0.1", port=proxy.port, protocol=protocol) as client, client.pubsub() as pubsub:
            await pubsub.subscribe("channel")
            for number in range(300):
                await client.publish("channel", b"\r\n" * number * 40 + b":%d" % number)
            got: list[int] = []
            while (message := await pubsub.get_message(timeout=1.0)) is not None:
                if message["type"] == "message":
                    got.append(int(message["data"].rpartition(b":")[2]))
            assert got == sorted(set(got))
            assert (len(got), 300 - len(got)) == (proxy.passed, proxy.lost)
            assert 30 < proxy.lost < 90
