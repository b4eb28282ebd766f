"""A client that stops reading costs little memory, delays no other client, and misses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.errors import CloseCode
from realtime.fanout import subscription
from server import websocket_protocol
from server.websocket_protocol import MarqueeWebSocketProtocol
from tests.support.backends import SQLITE_ONLY
from tests.support.served_here import served_here
from tests.support.service import Person, Service, Watcher, eventually
from tests.support.sockets import closing

BULK = [{"title": "Long", "description": "x" * 9_500}] * 100
BULKS = 110
ROWS = BULKS * len(BULK)  # a little over 100 MB of events
STOPPED_SECONDS = 20.0
ALLOWED_BYTES = 8 * 2**20


def peak_bytes(service: Service) -> int:
    status = Path(f"/proc/{service.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def reset_peak(service: Service) -> None:
    Path(f"/proc/{service.pid}/clear_refs").write_text("5")


async def count_rows(watcher: Watcher, total: int) -> int:
    """Read `total` rows of `add_bulk` events without keeping them. Return the size of the frames in bytes."""
    rows = size = 0
    last = watcher.welcome["data"]["seq"]
    while rows < total:
        async with asyncio.timeout(60):
            text = await watcher.socket.recv(decode=False)
        assert text.startswith(b'{"operation":"add_bulk"'), text[:200]
        start = text.index(b'"seq":') + 6
        seq = int(text[start : text.index(b",", start)])
        assert seq > last, "expected ascending numbers"
        last = seq
        start = text.index(b'"count":') + 8
        rows += int(text[start : text.index(b",", start)])
        size += len(text)
    assert rows == total
    return size


async def write(alice: Person, bulks: int) -> None:
    for _ in range(bulks):
        await alice.add_bulk(BULK)


async def run(service: Service, alice: Person, slow: Watcher | None) -> tuple[int, float]:
    """Send 100 MB of events to a fast reader. Return the peak memory in bytes and the reader's time in seconds."""
    async with service.watch("topics=movies") as good:
        reset_peak(service)
        started = time.monotonic()
        async with asyncio.TaskGroup() as both:
            both.create_task(write(alice, BULKS))
            size = both.create_task(count_rows(good, ROWS))
        assert size.result() > 100_000_000
        seconds = time.monotonic() - started
        if slow is not None:
            await asyncio.sleep(max(0.0, STOPPED_SECONDS - seconds))  # read nothing for at least that long
        return peak_bytes(service), seconds


# PostgreSQL is enough: its driver needs more memory than SQLite's; the hub and the replay need the same on both.
@pytest.mark.parametrize("backend", ["postgres"], indirect=True, scope="session")
async def test_a_reader_that_stops_for_20_seconds_costs_no_memory_and_misses_nothing(
    new_service: Callable[..., Service],
) -> None:
    # Other tests share the machine, and a delayed service uses more memory. This noise differs between runs but never
    # lowers a result, so the lowest result counts. Each run has a new process.
    costs: list[int] = []
    while len(costs) < 3 and min(costs, default=ALLOWED_BYTES + 1) > ALLOWED_BYTES:
        service = new_service(LOG_LEVEL="warning").start()
        costs.append(await cost_of_a_stopped_reader(service))
        service.kill()
    assert min(costs) <= ALLOWED_BYTES, costs


async def cost_of_a_stopped_reader(service: Service) -> int:
    """Return how many bytes of memory a stopped reader costs. Assert that it later gets everything in order."""
    async with service.person() as alice:
        await write(alice, BULKS // 2)  # fill the ring
        without, _ = await run(service, alice, None)
        # A client that reads nothing does not see the answers to its own pings, either.
        async with service.watch("topics=movies", max_queue=1, ping_interval=None) as slow:
            stopped = time.monotonic()
            with_it, _ = await run(service, alice, slow)
            assert time.monotonic() - stopped >= STOPPED_SECONDS
            assert await count_rows(slow, ROWS) > 100_000_000
            await slow.sees(await alice.add(title="live again"))
        return with_it - without


@SQLITE_ONLY
async def test_a_reader_that_never_reads_is_closed_as_too_slow(
    new_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscription, "SLOW_CLIENT_SECONDS", 2.0)
    # The close frame comes after all unread data, and a busy machine needs time to read that data.
    monkeypatch.setattr(websocket_protocol, "CLOSE_SECONDS", 30.0)
    service = new_service()
    async with served_here(service):
        async with service.person() as alice, service.watch("topics=movies", max_queue=1) as deaf:
            await alice.generated("movies", 40_000)
            await asyncio.sleep(4.0)  # the client reads nothing for longer than the limit
            assert (await closing(deaf, 60))[0] == CloseCode.TOO_SLOW
        async with service.person() as alice, service.watch() as watcher:
            await watcher.sees(await alice.add())


@SQLITE_ONLY
async def test_a_peer_that_answers_no_pings_is_dropped_while_events_are_sent(
    new_service: Callable[..., Service],
) -> None:
    """Writes that the kernel accepts do not show that the peer is alive."""
    service = new_service()
    async with served_here(service, ws_ping_interval=0.3, ws_ping_timeout=1.0), service.person() as alice:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port, limit=1)
        writer.write(
            b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        transport: Any = writer.transport
        transport.pause_reading()
        started = time.monotonic()
        await eventually(lambda: connections_of(service), "the socket is open", 5)
        while connections_of(service):
            await alice.add(description="x" * 5_000)
            assert time.monotonic() - started < 15
        assert time.monotonic() - started > 1.0
        writer.close()
        assert reader is not None


@SQLITE_ONLY
async def test_a_peer_that_answers_pings_is_kept(new_service: Callable[..., Service]) -> None:
    service = new_service()
    async with served_here(service, ws_ping_interval=0.2, ws_ping_timeout=0.5), service.person() as alice:
        async with service.watch() as watcher:
            with contextlib.suppress(TimeoutError):
                await watcher.next(2.0)  # wait for ten ping intervals
            await watcher.sees(await alice.add())


def connections_of(service: Service) -> list[MarqueeWebSocketProtocol]:
    """Return the websockets that are open in this process."""
    return [each for each in gc.get_objects() if isinstance(each, MarqueeWebSocketProtocol) and not each.disconnected]
