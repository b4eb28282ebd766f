"""Workers restarted one after another under load: nothing is lost, and no client waits long. `make chaos` does ten."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.chaos.rolling import LONGEST_SILENCE_SECONDS, Rolling, run
from tests.support.servers import PostgresServer, RedisServer
from tests.support.service import Service

TIMES = 10
SECONDS = 15.0  # no more restarts are begun after this: ten need a minute where nothing else runs


@pytest.mark.alone
async def test_rolling_restarts_lose_nothing_and_keep_nobody_waiting(
    postgres: PostgresServer, redis: RedisServer, tmp_path: Path
) -> None:
    service = Service(
        postgres.create_database(), redis.url, tmp_path, WORKERS="4", LOG_LEVEL="warning", RATE_LIMITS="off"
    )
    with service.running():
        outcome = await run(Rolling(1, TIMES, SECONDS), service)
        print(outcome.report())
        assert outcome.problems == [], outcome.report()
        assert max(outcome.silences) < LONGEST_SILENCE_SECONDS, outcome.report()
        assert outcome.writes_per_second > 20, outcome.report()
        assert await asyncio.to_thread(service.stop) == 0
        assert '"level": "error"' not in service.log()
