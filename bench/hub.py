"""Measure how long the hub blocks the event loop when many subscriptions receive the same events.

python -m bench.hub [subscriptions] [sockets of each client]

The hub runs in this process, without a service or a database. The sockets are real, and another process reads them.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import selectors
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import orjson
import uvloop

from bench.service import argument
from core.filters import Filter, parse_json
from core.network.unsent import UnsentBytes
from realtime.fanout.evaluation import Evaluation
from realtime.fanout.hub import Hub
from realtime.fanout.spec import Spec
from realtime.fanout.subscription import Subscription
from realtime.feed.feed import PAGE_BYTES, PAGE_EVENTS
from realtime.feed.ring import Ring
from realtime.wire.frames import Frames, Rendering
from realtime.wire.room import Room
from realtime.wire.writer import HIGH_WATER_BYTES, LOW_WATER_BYTES
from repository.engine.events import Event, Head
from resources.movies import MOVIES

SUBSCRIPTIONS_PER_SOCKET = 32
PROBE_SECONDS = 0.005
THROUGHPUT_WATCHERS = 1_000
THROUGHPUT_EVENTS = 2_000


class Log:
    """The part of a feed that the hub and its subscriptions read."""

    def __init__(self) -> None:
        self.head = Head("e", 0)
        self.generation = 0
        self.ring = Ring()

    def append(self, event: Event) -> None:
        self.ring.append(event)
        self.head = Head("e", event.seq)

    def newest_after(self, seq: int) -> list[Event] | None:
        if seq >= self.head.seq:
            return []
        return self.ring.after(seq, max_events=PAGE_EVENTS, max_bytes=PAGE_BYTES)

    async def read_after(self, seq: int) -> list[Event]:
        found = self.newest_after(seq)
        assert found is not None
        return found


class Socket(asyncio.Protocol):
    """A socket that only sends; it is the writer of its subscriptions as well."""

    def __init__(self) -> None:
        self.transport = cast(asyncio.Transport, None)
        self._written = 0
        self._low = asyncio.Event()
        self._low.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=HIGH_WATER_BYTES, low=LOW_WATER_BYTES)

    def pause_writing(self) -> None:
        self._low.clear()

    def resume_writing(self) -> None:
        self._low.set()

    def write(self, frames: Frames) -> None:
        self._written += len(frames.wire)
        self.transport.write(frames.wire)

    def buffered(self) -> int:
        return self.transport.get_write_buffer_size()

    def taken(self) -> int:
        return self._written - self.buffered()

    async def drained(self) -> None:
        await self._low.wait()

    def count_control_frames(self, on_control_frame: Callable[[], bool]) -> None:
        pass

    def close(self, code: int) -> None:
        raise AssertionError(code)


def read_all(path: str, sockets: int) -> None:
    """Connect this many sockets, and read and discard what they receive."""
    selector = selectors.DefaultSelector()
    for _ in range(sockets):
        each = socket.socket(socket.AF_UNIX)
        each.connect(path)
        each.setblocking(False)
        selector.register(each, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if not cast(socket.socket, key.fileobj).recv(1024 * 1024):
                os._exit(0)


class Probe:
    """The longest delay of a task that wakes every PROBE_SECONDS, and the longest CPU time of the loop meanwhile.

    On a machine that runs other programs, too, the CPU time shows what the loop itself caused.
    """

    def __init__(self) -> None:
        self.longest = self.longest_cpu = 0.0

    async def run(self) -> None:
        while True:
            begun, cpu = time.perf_counter(), time.thread_time()
            await asyncio.sleep(PROBE_SECONDS)
            self.longest = max(self.longest, time.perf_counter() - begun - PROBE_SECONDS)
            self.longest_cpu = max(self.longest_cpu, time.thread_time() - cpu - PROBE_SECONDS)


def wanted_by(value: dict[str, Any]) -> Filter:
    wanted, problems = parse_json(value, MOVIES.fields)
    assert not problems
    return wanted


FILTERS: dict[str, Callable[[int], tuple[tuple[str, Filter], ...]]] = {
    "no filter": lambda number: (),
    "equal filters": lambda number: (("movies", wanted_by({"rating": {"gte": 1}})),),
    "different filters": lambda number: (("movies", wanted_by({"rating": {"gte": 1}, "id": {"gt": -number}})),),
    "different parts": lambda number: (("movies", wanted_by({"id": {"gt": number % 4_000}})),),
}


def movie(key: int, size: int) -> dict[str, Any]:
    return {"id": key, "title": "The Third Man", "overview": "x" * size, "rating": 50, "genres": ["Noir"], "user_id": 1}


def small(seq: int) -> Event:
    return _event(seq, "add", movie(seq, 100))


def large(seq: int) -> Event:
    return _event(seq, "add", movie(seq, 10_000))


def bulk(seq: int) -> Event:
    rows = [movie(key, 100) for key in range(1, 1_001)]
    return _event(seq, "add_bulk", {"count": len(rows), "items": rows})


def update_bulk(seq: int) -> Event:
    rows = [movie(key, 500) for key in range(1, 1_001)]
    event = _event(seq, "update_bulk", {"count": len(rows), "items": rows})
    before = orjson.dumps([{"genres": ["Thriller"]} for _ in rows])
    return replace(event, before=before, changed=("genres",))


def _event(seq: int, operation: str, value: Any) -> Event:
    stamp = "2026-01-01T00:00:00.000000Z"
    return Event("e", seq, "movies", operation, None, "public", orjson.dumps(value), None, (), 1, stamp)


class Stage:
    """A hub with subscriptions on real sockets."""

    def __init__(self, sockets: Sequence[Socket], client_sockets: int) -> None:
        self.log = Log()
        self.hub = Hub(cast(Any, self.log))
        self.unsent: UnsentBytes[Any] = UnsentBytes()
        self.sockets = sockets
        self.rooms = [
            Room(each, self.unsent, f"client {place // client_sockets}") for place, each in enumerate(sockets)
        ]
        self.source = type("Source", (), {"evaluation": Evaluation()})()
        self.subscriptions: list[Subscription] = []

    def subscribe(self, count: int, filters: Callable[[int], Any], latest: int | None = None) -> None:
        parts = cast(Any, {"feed": self.log, "live": self.hub, "snapshots": self.source})
        for number in range(count):
            place = number % len(self.sockets)
            rendering = Rendering("items", f"s{number // len(self.sockets)}")
            spec = Spec(frozenset({"movies"}), rendering, filters=filters(number), latest_every_ms=latest)
            subscription = Subscription(spec, self.sockets[place], self.rooms[place], **parts)
            subscription.start(self.log.head.seq)
            self.subscriptions.append(subscription)

    def write(self, event: Callable[[int], Event]) -> None:
        made = event(self.log.head.seq + 1)
        self.log.append(made)
        self.hub.publish([made])

    async def settle(self, seconds: float = 60) -> None:
        """Wait until every subscription has every event."""
        async with asyncio.timeout(seconds):
            while not self.is_settled():
                await asyncio.sleep(0.001)

    def is_settled(self) -> bool:
        return (
            self.hub.position == self.log.head.seq
            and not getattr(self.hub, "_work", None)
            and len(self.hub) == len(self.subscriptions)
            and not any(each.buffered() for each in self.sockets)
        )

    def stop(self) -> None:
        for each in self.subscriptions:
            each.stop()
        self.subscriptions.clear()


async def connected(path: str, count: int) -> list[Socket]:
    made: list[Socket] = []

    def factory() -> Socket:
        made.append(Socket())
        return made[-1]

    server = await asyncio.get_running_loop().create_unix_server(factory, path, backlog=1_000)
    multiprocessing.get_context("spawn").Process(target=read_all, args=(path, count), daemon=True).start()
    while len(made) < count or any(each.transport is None for each in made):
        await asyncio.sleep(0.001)
    server.close()
    return made


async def pauses(sockets: Sequence[Socket], count: int, client_sockets: int) -> None:
    print(f"{count} subscriptions, {len(sockets)} sockets, {client_sockets} of each client")
    print(f"{'':36}{'longest delay, ms':>20}{'of it CPU, ms':>16}{'until all have all, ms':>26}")
    for kind, filters in FILTERS.items():
        for name, event, times in (
            ("small", small, 20),
            ("10 kB", large, 5),
            ("bulk", bulk, 2),
            ("update_bulk", update_bulk, 2),
        ):
            stage = Stage(sockets, client_sockets)
            stage.subscribe(count, filters)
            await stage.settle()
            probe = Probe()
            probing = asyncio.create_task(probe.run())
            await asyncio.sleep(0.01)
            begun = time.perf_counter()
            try:
                for _ in range(times):
                    stage.write(event)
                    await asyncio.sleep(0.01)
                await stage.settle()
                took = f"{(time.perf_counter() - begun) * 1000:>26,.0f}"
            except TimeoutError:
                took = f"{'> 60 s':>26}"
            probing.cancel()
            print(
                f"{kind + ', ' + name:36}{probe.longest * 1000:>20,.1f}{probe.longest_cpu * 1000:>16,.1f}{took}",
                flush=True,
            )
            stage.stop()
            await asyncio.sleep(0.1)


async def throughput(sockets: Sequence[Socket]) -> None:
    stage = Stage(sockets[:THROUGHPUT_WATCHERS], len(sockets))
    stage.subscribe(min(THROUGHPUT_WATCHERS, len(sockets)), FILTERS["no filter"])
    before, begun = time.process_time(), time.perf_counter()
    for _ in range(THROUGHPUT_EVENTS):
        stage.write(small)
        while stage.hub.position < stage.log.head.seq or getattr(stage.hub, "_work", None):
            await asyncio.sleep(0)
    cpu, seconds = time.process_time() - before, time.perf_counter() - begun
    await stage.settle()
    rate, each = THROUGHPUT_EVENTS / seconds, cpu / THROUGHPUT_EVENTS * 1e6
    print(f"{len(stage.subscriptions)} plain watchers: {rate:,.0f} events/s, {each:,.0f} CPU µs/event")


async def main() -> None:
    count, client_sockets = argument(1, 4_000), argument(2, 1_000)
    with tempfile.TemporaryDirectory() as folder:
        only_throughput = count == 0
        number = THROUGHPUT_WATCHERS if only_throughput else -(-count // SUBSCRIPTIONS_PER_SOCKET)
        sockets = await connected(str(Path(folder) / "socket"), number)
        if only_throughput:
            await throughput(sockets)
        else:
            await pauses(sockets, count, client_sockets)
        for each in sockets:
            each.transport.abort()


if __name__ == "__main__":
    uvloop.run(main())
