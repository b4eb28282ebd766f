"""The short form of the chaos run: every fault once. `make chaos` is the long form; docs/chaos.md describes both."""

from __future__ import annotations

import os
import random
from pathlib import Path

from tests.chaos.chaos import run
from tests.chaos.faults import FAULTS, Chaos, schedule
from tests.chaos.writers import plan
from tests.support.servers.postgresql import PostgresServer
from tests.support.servers.redis import RedisServer

SEED = int(os.environ.get("SEED") or random.randrange(10**6))  # a failing test prints the seed
SHORT = Chaos(SEED, writes=1_000, watchers=60, writes_per_second=80.0, fault_seconds=2.0)


async def test_no_watcher_is_ever_wrong_whatever_breaks(
    own_postgres: PostgresServer, own_redis: RedisServer, tmp_path: Path
) -> None:
    outcome = await run(SHORT, own_postgres, own_redis, tmp_path)
    print(outcome.report())
    assert outcome.problems == [], outcome.report()
    assert {fault.kind for _, _, fault in outcome.faults} == set(FAULTS)
    assert sum(outcome.statuses.values()) >= SHORT.writes
    assert 0.1 < outcome.bus_lost / (outcome.bus_lost + outcome.bus_passed) < 0.6
    for kind, counts in outcome.kinds.items():
        # Each kind of watcher must have received events. A coalescing watcher receives fewer frames by design.
        assert counts["events"] > (20 if kind.startswith("intervals") else 100), outcome.report()


def test_the_same_seed_plans_the_same_faults_and_the_same_writes() -> None:
    assert schedule(SHORT) == schedule(SHORT)
    assert plan(SEED, 3, 100) == plan(SEED, 3, 100)
    other = Chaos(SEED + 1, SHORT.writes)
    assert schedule(SHORT) != schedule(other)
    assert plan(SEED, 3, 100) != plan(SEED + 1, 3, 100) != plan(SEED, 4, 100)
