"""Workers are restarted one by one under load: nothing is lost, and no client waits long."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.chaos.rolling import LONGEST_SILENCE_SECONDS, Rolling, run
from tests.support.servers.postgresql import PostgresServer
from tests.support.servers.redis import RedisServer
from tests.support.service import Service

MIN_EVENTS = 1_000
TIMES = 10
SECONDS = 15.0  # no restart begins after this time: all ten take a minute, and only `make chaos` waits for them


@pytest.mark.alone
async def test_rolling_restarts_lose_nothing_and_disconnect_clients_only_briefly(
    postgres: PostgresServer, redis: RedisServer, tmp_path: Path
) -> None:
    settings = {"WORKERS": "4", "LOG_LEVEL": "warning", "RATE_LIMITS": "off"}
    service = Service(postgres.create_database(), redis.url, tmp_path, **settings)
    with service.running():
        outcome = await run(Rolling(1, TIMES, SECONDS), service)
        print(outcome.report())
        assert outcome.problems == [], outcome.report()
        assert max(outcome.silences) < LONGEST_SILENCE_SECONDS, outcome.report()
        assert {end for end in outcome.ends if end.isdigit()} == {"1012"}, outcome.report()
        assert outcome.events > MIN_EVENTS, outcome.report()
        assert await asyncio.to_thread(service.stop) == 0
        assert '"level": "error"' not in service.log()
