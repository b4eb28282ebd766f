"""The long form of the chaos run. `make chaos`, `make chaos SEED=7`; what it does is in docs/chaos.md."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
from pathlib import Path

from tests.chaos import run
from tests.chaos_faults import Chaos
from tests.servers import PostgresServer, RedisServer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=int(os.environ.get("SEED") or random.randrange(10**6)))
    parser.add_argument("--writes", type=int, default=10_000)
    parser.add_argument("--watchers", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--per-second", type=float, default=60.0, help="writes")
    given = parser.parse_args()
    chaos = Chaos(
        given.seed,
        given.writes,
        watchers=given.watchers,
        rounds=given.rounds,
        writes_per_second=given.per_second,
    )
    print(f"seed {chaos.seed}; the same run again: make chaos SEED={chaos.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="marquee-chaos-") as folder, PostgresServer() as postgres:
        with RedisServer() as redis:
            outcome = asyncio.run(run(chaos, postgres, redis, Path(folder)))
    print(outcome.report())
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
