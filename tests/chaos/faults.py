"""The faults of the chaos run: what breaks, when, and how it is repaired. Every fault comes from outside the service.

Faults that other tests use, too, are in `tests/support/servers/` and `proxies.py`.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.proxies import Proxies, Proxy, RedisProxy
from tests.support.servers.postgresql import PostgresServer
from tests.support.servers.redis import RedisServer
from tests.support.service import Service, eventually

FAULTS = (
    "kill a worker",
    "freeze a worker",
    "deafen a worker",
    "kill Redis",
    "freeze Redis",
    "cut pub/sub",
    "restart PostgreSQL",
    "crash PostgreSQL",
    "cut clients",
)
SETTINGS = {"LOG_LEVEL": "warning", "ACCESS_TOKEN_EXPIRE_MINUTES": "600", "MAX_CONNECTIONS_PER_ADDRESS": "10000"}


@dataclass(frozen=True)
class Chaos:
    """The seed and the size of a run. Each fault happens `rounds` times and lasts up to about `fault_seconds`."""

    seed: int
    writes: int
    watchers: int = 200
    workers: int = 4
    writers: int = 12
    writes_per_second: float = 80.0
    rounds: int = 1
    fault_seconds: float = 3.0
    lost_messages: float = 0.2


@dataclass(frozen=True)
class Fault:
    """A fault that starts once `at` writes have begun. `target`, from 0 to 1, selects the affected worker, if any."""

    at: int
    kind: str
    seconds: float
    target: float


def schedule(chaos: Chaos) -> list[Fault]:
    """Return the faults of a run; a pure function of its seed and size."""
    chance = random.Random(f"faults {chaos.seed}")
    kinds = [kind for _ in range(chaos.rounds) for kind in chance.sample(FAULTS, len(FAULTS))]
    step = chaos.writes * 0.85 / len(kinds)
    return [
        Fault(
            round(chaos.writes * 0.05 + step * (index + chance.uniform(0, 0.5))),
            kind,
            round(chance.uniform(0.4, 1.0) * chaos.fault_seconds, 2),
            chance.random(),
        )
        for index, kind in enumerate(kinds)
    ]


class Stage:
    """The servers, the workers, and the proxies in front of Redis and of the workers."""

    def __init__(
        self, chaos: Chaos, postgres: PostgresServer, redis: RedisServer, proxies: Proxies, folder: Path
    ) -> None:
        self.seed = chaos.seed
        self.postgres = postgres
        self.redis = redis
        self.url = postgres.create_database()
        self.buses: list[RedisProxy] = []
        self.services: list[Service] = []
        self.doors: list[Proxy] = []
        for index in range(chaos.workers):
            bus = proxies.redis(redis.port, chaos.seed + index, chaos.lost_messages)
            service = Service(self.url, f"redis://127.0.0.1:{bus.port}/0", folder, **SETTINGS)
            self.buses.append(bus)
            self.services.append(service)
            self.doors.append(proxies.cutting(service.port))
        self.locks = {name: asyncio.Lock() for name in ("redis", "postgres", *map(str, range(chaos.workers)))}
        self.being_killed: set[int] = set()
        self.unasked_ends: list[str] = []

    async def start(self) -> None:
        # Start the workers one after another, because the first one migrates the database.
        for service in self.services:
            await asyncio.to_thread(service.start)

    async def revive(self, index: int) -> None:
        """Retry starting a worker until it succeeds, as a supervisor does, because the database may be down."""
        while True:
            try:
                await asyncio.to_thread(self.services[index].start)
                return
            except AssertionError:
                await asyncio.sleep(0.2)

    async def supervise(self) -> None:
        """Record each worker that ends without being killed, and restart it."""
        while True:
            await asyncio.sleep(0.1)
            for index, service in enumerate(self.services):
                ended = service.process is not None and service.process.poll() is not None
                if ended and index not in self.being_killed:
                    self.unasked_ends.append(f"worker {index} ended by itself:\n{service.log()[-3000:]}")
                    await self.revive(index)

    async def cut_at_random(self) -> None:
        """Reset some of the proxied client sockets from time to time."""
        chance = random.Random(f"cuts {self.seed}")
        while True:
            await asyncio.sleep(chance.uniform(0.5, 2.0))
            door = chance.choice(self.doors)
            await asyncio.to_thread(door.cut, 0.3, chance.randrange(2**32))

    async def suffer(self, fault: Fault) -> None:
        """Carry out a fault: break something, wait, and repair it."""
        index = int(fault.target * len(self.services))
        broken: dict[str, tuple[str, Callable[[int, float], Awaitable[None]]]] = {
            "kill a worker": (str(index), self._kill_worker),
            "freeze a worker": (str(index), self._freeze_worker),
            "deafen a worker": (str(index), self._deafen_worker),
            "kill Redis": ("redis", self._kill_redis),
            "freeze Redis": ("redis", self._freeze_redis),
            "cut pub/sub": ("redis", self._cut_pubsub),
            "restart PostgreSQL": ("postgres", self._restart_postgres),
            "crash PostgreSQL": ("postgres", self._crash_postgres),
            "cut clients": (str(index), self._cut_clients),
        }
        what, work = broken[fault.kind]
        async with self.locks[what]:
            await work(index, fault.seconds)

    async def _kill_worker(self, index: int, seconds: float) -> None:
        self.being_killed.add(index)
        await asyncio.to_thread(self.services[index].kill)
        await asyncio.sleep(seconds / 2)
        await self.revive(index)
        self.being_killed.discard(index)

    async def _freeze_worker(self, index: int, seconds: float) -> None:
        self.services[index].signal(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        self.services[index].signal(signal.SIGCONT)

    async def _deafen_worker(self, index: int, seconds: float) -> None:
        self.buses[index].is_silent = True
        await asyncio.sleep(seconds + 1.0)
        self.buses[index].is_silent = False

    async def _kill_redis(self, index: int, seconds: float) -> None:
        await asyncio.to_thread(self.redis.kill)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(self.redis.start)

    async def _freeze_redis(self, index: int, seconds: float) -> None:
        await asyncio.to_thread(self.redis.freeze)
        await asyncio.sleep(seconds)
        self.redis.thaw()

    async def _cut_pubsub(self, index: int, seconds: float) -> None:
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.redis.port)
            writer.write(b"CLIENT KILL TYPE pubsub\r\n")
            await reader.readline()
            writer.close()
            await asyncio.sleep(seconds / 3)

    async def _restart_postgres(self, index: int, seconds: float) -> None:
        await asyncio.to_thread(self.postgres.restart)

    async def _crash_postgres(self, index: int, seconds: float) -> None:
        """Shut PostgreSQL down immediately, so that it has to recover at its next start."""
        os.kill(self.postgres.pid, signal.SIGQUIT)
        await eventually(lambda: not self.postgres.running, "PostgreSQL ends")
        await asyncio.sleep(seconds / 2)
        await asyncio.to_thread(self.postgres.start)

    async def _cut_clients(self, index: int, seconds: float) -> None:
        for door in self.doors:
            await asyncio.to_thread(door.cut)
