"""The long chaos run, followed by ten rolling restarts: `make chaos SEED=7`. docs/chaos.md describes both."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import sys
import tempfile
from pathlib import Path

from tests.chaos.chaos import run as run_chaos
from tests.chaos.faults import Chaos
from tests.chaos.rolling import LONGEST_SILENCE_SECONDS, Rolling
from tests.chaos.rolling import run as run_rolling
from tests.support import reaper
from tests.support.servers.postgresql import PostgresServer
from tests.support.servers.redis import RedisServer
from tests.support.service import Service


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=int(os.environ.get("SEED") or random.randrange(10**6)))
    parser.add_argument("--part", choices=("chaos", "rolling", "all"), default="all")
    parser.add_argument("--writes", type=int, default=10_000)
    parser.add_argument("--watchers", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5, help="how many times each fault happens")
    parser.add_argument("--per-second", type=float, default=60.0, help="writes per second")
    parser.add_argument("--restarts", type=int, default=10)
    given = parser.parse_args()
    print(f"seed {given.seed}; to repeat this run: make chaos SEED={given.seed}\n", flush=True)
    is_right = True
    reaper.start()
    place = tempfile.TemporaryDirectory(prefix=reaper.folder_prefix("chaos"), dir=reaper.TMP)
    with place as folder, PostgresServer() as postgres:
        with RedisServer() as redis:
            if given.part != "rolling":
                size = {"watchers": given.watchers, "rounds": given.rounds, "writes_per_second": given.per_second}
                chaos = Chaos(given.seed, given.writes, **size)
                outcome = asyncio.run(run_chaos(chaos, postgres, redis, Path(folder)))
                print(outcome.report(), "\n", flush=True)
                is_right = not outcome.problems
            if given.part != "chaos":
                is_right &= restart_again_and_again(given.seed, given.restarts, postgres, redis, Path(folder))
    return 0 if is_right else 1


def restart_again_and_again(seed: int, times: int, postgres: PostgresServer, redis: RedisServer, folder: Path) -> bool:
    settings = {"WORKERS": "4", "LOG_LEVEL": "warning", "RATE_LIMITS": "off"}
    with Service(postgres.create_database(), redis.url, folder, **settings).running() as service:
        outcome = asyncio.run(run_rolling(Rolling(seed, times, math.inf), service))
    print(outcome.report())
    return not outcome.problems and max(outcome.silences) < LONGEST_SILENCE_SECONDS


if __name__ == "__main__":
    sys.exit(main())
