"""Two thousand watchers are disconnected and resume at the same moment, while writes go on."""

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
from tests.support.metrics import metric
from tests.support.servers.postgresql import PostgresServer
from tests.support.servers.redis import RedisServer
from tests.support.service import ROOT, Person, Service, several_services

WATCHERS = 2_000
AWAY_SECONDS = 1.0
CATCH_UP_SECONDS = 10.0
MAX_LOG_READS = 10  # log reads per worker
PAUSE_SECONDS = 0.04


@pytest.fixture
def many_files() -> Iterator[None]:
    """Raise the limit on open files, because each socket counts as an open file. The services inherit the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8 * WATCHERS), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def workers(
    many_files: None, postgres: PostgresServer, redis: RedisServer, tmp_path: Path
) -> Iterator[tuple[Service, ...]]:
    settings = {"LOG_LEVEL": "warning", "MAX_CONNECTIONS_PER_ADDRESS": "10000", "MAX_CONNECTIONS": "10000"}
    with several_services(2, postgres.create_database(), redis.url, tmp_path, **settings) as services:
        yield services


@dataclass
class Crowd:
    """Watchers that run in a separate process."""

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
    command = [sys.executable, "-m", "tests.chaos.storm_client", str(number), *(str(each.port) for each in services)]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=2**24
    )
    try:
        yield Crowd(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def being_written(*people: Person) -> AsyncIterator[None]:
    """Let these people write until the end of the block."""
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


@pytest.mark.alone
async def test_a_storm_of_resumes_costs_the_database_hardly_any_reads(workers: tuple[Service, ...]) -> None:
    async with workers[0].person() as alice, workers[1].person() as bob, crowd(WATCHERS, *workers) as watchers:
        async with being_written(alice, bob):
            await watchers.do("connect")
            before = [await metric(worker, "marquee_log_reads_total") for worker in workers]
            found = await watchers.do("cut", away_seconds=AWAY_SECONDS)
            after = [await metric(worker, "marquee_log_reads_total") for worker in workers]
        log = await read_log(workers[0].database_url)
        judged = await watchers.do("judge", seqs=[entry.seq for entry in log.entries])
        assert judged["wrong"] == []
        assert found["missed"] > 10
        assert found["seconds"] < CATCH_UP_SECONDS
        assert all(late - early <= MAX_LOG_READS for early, late in zip(before, after, strict=True))
        assert min(before) >= 1, "filling the ring at the start counts as a log read"
