"""Two thousand watchers are cut at once and come back at once, while writes go on."""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.judge import read_log
from tests.support.servers import PostgresServer, RedisServer
from tests.support.service import ROOT, Person, Service

WATCHERS = 2_000
AWAY_SECONDS = 1.0
CATCH_UP_SECONDS = 10.0
MAX_LOG_READS = 10  # per worker
PAUSE_SECONDS = 0.04


@pytest.fixture
def many_files() -> Iterator[None]:
    """The services inherit the limit: a socket is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8 * WATCHERS), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def workers(
    many_files: None, postgres: PostgresServer, redis: RedisServer, tmp_path: Path
) -> Iterator[tuple[Service, Service]]:
    url = postgres.create_database()
    settings = {"LOG_LEVEL": "warning", "MAX_CONNECTIONS_PER_ADDRESS": "10000", "MAX_CONNECTIONS": "10000"}
    services = [Service(url, redis.url, tmp_path, **settings) for _ in range(2)]
    with services[0].running() as first, services[1].running() as second:
        yield first, second


@dataclass
class Crowd:
    """Watchers in a process of their own."""

    process: asyncio.subprocess.Process

    async def do(self, what: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": what, **arguments}).encode() + b"\n")
        async with asyncio.timeout(120):
            answer: dict[str, Any] = json.loads(await self.process.stdout.readline())
        return answer


@asynccontextmanager
async def crowd(number: int, *services: Service) -> AsyncIterator[Crowd]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.chaos.storm_client",
        str(number),
        *(str(service.port) for service in services),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**24,
    )
    try:
        yield Crowd(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def being_written(*people: Person) -> AsyncIterator[None]:
    """Writes go on until the end of the block, and no longer."""
    enough = asyncio.Event()

    async def write(person: Person) -> None:
        while not enough.is_set():
            await person.add(description="x" * 300)
            await asyncio.sleep(PAUSE_SECONDS)

    async with asyncio.TaskGroup() as tasks:
        for person in people:
            tasks.create_task(write(person))
        yield
        enough.set()


async def log_reads(service: Service) -> float:
    async with service.anyone() as client:
        lines = (await client.get("/metrics")).text.splitlines()
    return float(next(line for line in lines if line.startswith("marquee_log_reads_total ")).split()[1])


@pytest.mark.alone
async def test_a_storm_of_resumes_costs_the_database_next_to_nothing(workers: tuple[Service, Service]) -> None:
    async with workers[0].person() as alice, workers[1].person() as bob, crowd(WATCHERS, *workers) as watchers:
        async with being_written(alice, bob):
            await watchers.do("connect")
            before = [await log_reads(worker) for worker in workers]
            found = await watchers.do("cut", away_seconds=AWAY_SECONDS)
            after = [await log_reads(worker) for worker in workers]
        log = await read_log(workers[0].database_url)
        judged = await watchers.do("judge", seqs=[entry.seq for entry in log.entries])
        assert judged["wrong"] == []
        assert found["missed"] > 10
        assert found["seconds"] < CATCH_UP_SECONDS
        assert all(late - early <= MAX_LOG_READS for early, late in zip(before, after, strict=True))
        assert min(before) >= 1, "what a worker remembers at its start comes from the log, and counts"
