"""Measure what a write costs with many watchers: without filters, with one shared filter, and with different filters.

python -m bench.fanout [watchers] [writes]
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect

from bench.service import Service, argument, cpu_seconds, running, signed_in

WRITERS = 4
# For each kind: a function that takes a watcher's number and returns the watcher's filter, and whether these filters
# match the written movies, whose `duration_minutes` is 104.
KINDS: dict[str, tuple[Callable[[int], Any], bool]] = {
    "no filter": (lambda number: None, True),
    "one shared filter": (lambda number: {"duration_minutes": 104}, True),
    "different equality filters, no match": (lambda number: {"duration_minutes": 200 + number}, False),
    "different range filters, no match": (lambda number: {"duration_minutes": {"gte": 200 + number}}, False),
    "different filters, all match": (lambda number: {"duration_minutes": {"lte": 200 + number}}, True),
}


async def _watcher(url: str, wanted: Any) -> ClientConnection:
    socket = await connect(url, max_size=None, max_queue=None, compression=None)
    await socket.recv()
    await socket.send(json.dumps({"action": "subscribe", "id": 1, "topics": ["movies"], "filter": wanted}))
    while b'"reply_to"' not in await socket.recv(decode=False):
        pass
    return socket


async def _read(socket: ClientConnection, writes: int) -> None:
    seen = 0
    while seen < writes:
        seen += (await socket.recv(decode=False)).startswith(b'{"operation":"add"')


async def _write(client: httpx.AsyncClient, writes: int) -> None:
    for _ in range(writes):
        body = {"title": "The Third Man", "release_date": "1949-09-02", "duration_minutes": 104}
        (await client.post("/movies", json=body)).raise_for_status()


async def measure(service: Service, watchers: int, writes: int) -> None:
    url, pid = f"ws://127.0.0.1:{service.port}/ws?topics=jobs", service.pid
    async with signed_in(service) as client:
        await _write(client, 100)
        before = cpu_seconds(pid)
        await asyncio.gather(*(_write(client, writes // WRITERS) for _ in range(WRITERS)))
        alone = (cpu_seconds(pid) - before) * 1000 / writes
        print(
            f"{watchers} watchers, {WRITERS} writers, {writes} writes; a write without watchers: {alone:.2f} CPU ms\n"
        )
        print(f"{'':36}{'writes/s':>10}{'frames/s':>10}{'CPU ms/write':>14}{'µs/watcher':>12}")
        for kind, (wanted, matches) in KINDS.items():
            async with AsyncExitStack() as stack:
                sockets = [await _watcher(url, wanted(number)) for number in range(watchers)]
                for socket in sockets:
                    stack.push_async_callback(socket.close)
                reading = [asyncio.create_task(_read(socket, writes)) for socket in sockets if matches]
                before, begun = cpu_seconds(pid), time.monotonic()
                await asyncio.gather(*(_write(client, writes // WRITERS) for _ in range(WRITERS)))
                await asyncio.gather(*reading)
                seconds, cpu = time.monotonic() - begun, (cpu_seconds(pid) - before) * 1000 / writes
            frames = writes * watchers / seconds if matches else 0
            each = (cpu - alone) * 1000 / watchers
            print(f"{kind:36}{writes / seconds:>10,.0f}{frames:>10,.0f}{cpu:>14.2f}{each:>12.2f}")


if __name__ == "__main__":
    with running(settings={"RATE_LIMITS": "off"}) as service:
        asyncio.run(measure(service, argument(1, 200), argument(2, 400)))
