"""A worker that is connected to a silent bus still sends its watchers every event, and reports the silence."""

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

from tests.support.metrics import metric, metric_becomes
from tests.support.proxies import Proxies, RedisProxy
from tests.support.servers.postgresql import PostgresServer
from tests.support.servers.redis import RedisServer
from tests.support.service import Person, Service, Watcher, eventually

LATEST_SECONDS = 2.0
WATCHERS = 20
SILENT_SECONDS = 7.0  # long enough for the worker to give up the silent connection and subscribe again
PAUSE_SECONDS = 0.05
LAST = "the last"


@pytest.fixture
def proxies() -> Iterator[Proxies]:
    with Proxies() as running:
        yield running


@pytest.fixture
def bus(request: pytest.FixtureRequest, proxies: Proxies, redis: RedisServer) -> RedisProxy:
    """The proxy that the worker under test connects to instead of Redis."""
    proxy = proxies.redis(redis.port)
    proxy.is_silent = getattr(request, "param", False)
    return proxy


@pytest.fixture
def workers(
    postgres: PostgresServer, redis: RedisServer, bus: RedisProxy, tmp_path: Path
) -> Iterator[tuple[Service, Service]]:
    """Two workers: one with a working bus, and one whose bus is the proxy, which may be silent from the start."""
    url = postgres.create_database()
    urls = (redis.url, f"redis://127.0.0.1:{bus.port}/0")
    good, deaf = (Service(url, broadcast_url, tmp_path, LOG_LEVEL="warning") for broadcast_url in urls)
    with good.running(), deaf.running():
        yield good, deaf


async def status(client: httpx.AsyncClient, service: Service) -> str:
    """Return `ready`, or what `/readyz` reports about the bus if the bus is not ok."""
    answer = await client.get(f"{service.url}/readyz")
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["checks"]["bus"]
    assert answer.json()["status"] == ("ready" if found == "ok" else "degraded")
    return "ready" if found == "ok" else found


async def becomes(client: httpx.AsyncClient, service: Service, wanted: str, seconds: float) -> None:
    async def is_wanted() -> bool:
        return wanted in await status(client, service)

    await eventually(is_wanted, f"readiness reports {wanted}", seconds)


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
        assert frame["data"]["id"] not in arrived, "each event arrives once"
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
        await asyncio.gather(becomes(client, deaf, "ready", 5.0), becomes(client, good, "ready", 5.0))

        bus.is_silent = True
        written: dict[int, float] = {}
        reading = [asyncio.create_task(time_arrivals(watcher)) for watcher in crowd]
        await asyncio.gather(
            write_and_time(alice, written), write_and_time(bob, written), becomes(client, deaf, "silent", 3.0)
        )
        assert "silent" in await status(client, deaf), "the bus is still silent after subscribing again"
        assert await status(client, good) == "ready"
        assert (await metric(deaf, "marquee_bus_deaf"), await metric(good, "marquee_bus_deaf")) == (1, 0)
        assert bus.lost > 0
        last = await alice.add(title=LAST)
        written[last["id"]] = time.monotonic()
        arrivals = await asyncio.gather(*reading)
        lates = [arrived[id_] - answered for arrived in arrivals for id_, answered in written.items()]
        assert max(lates) < LATEST_SECONDS
        assert all(watcher.seqs == sorted(set(watcher.seqs)) for watcher in crowd)

        bus.is_silent = False
        await becomes(client, deaf, "ready", 10.0)
        await metric_becomes(deaf, "marquee_bus_deaf", 0, 3.0)


@pytest.mark.alone
@pytest.mark.parametrize("bus", [True], indirect=True)
async def test_a_worker_that_is_deaf_from_the_start_serves(workers: tuple[Service, Service]) -> None:
    good, deaf = workers
    async with good.person() as alice, deaf.watch("topics=movies") as watcher, httpx.AsyncClient() as client:
        await becomes(client, deaf, "silent", 5.0)
        for _ in range(10):
            await watcher.sees(await alice.add(), seconds=LATEST_SECONDS)


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
