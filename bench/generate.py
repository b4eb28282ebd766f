"""Measure the bulk generator on SQLite with one watcher: rows per second, pauses of the event loop, and memory.

python -m bench.generate [rows]
"""

from __future__ import annotations

import asyncio
import json
import time

from websockets.asyncio.client import connect

from bench.service import Service, argument, running, signed_in


async def _watch(url: str, rows: int, ready: asyncio.Event) -> tuple[int, int, float]:
    """Count the rows that arrive, as cheaply as possible. Return (rows, frames, time of the last frame)."""
    seen = frames = 0
    async with connect(url, max_size=None) as socket:
        await socket.recv()
        ready.set()
        while seen < rows:
            text = await socket.recv(decode=False)
            if text.startswith(b'{"operation":"add_bulk"'):
                seen += int(text[text.index(b'"count":') + 8 :].split(b",", 1)[0])
                frames += 1
    return seen, frames, time.monotonic()


async def measure(service: Service, rows: int) -> None:
    probe = service.probe
    async with signed_in(service) as client:
        # The first job fills the word pools and is not measured.
        await client.post("/movies/generate/1000")
        while (await client.get("/jobs?state=done")).json() == []:
            await asyncio.sleep(0.05)
        ready = asyncio.Event()
        watching = asyncio.create_task(_watch(f"ws://127.0.0.1:{service.port}/ws?topics=movies", rows, ready))
        await ready.wait()
        probe.unlink(missing_ok=True)
        started = time.monotonic()
        job = (await client.post(f"/movies/generate/{rows}")).json()
        memory: list[int] = []
        while not watching.done():
            await asyncio.sleep(0.25)
            if probe.exists() and (text := probe.read_text()):
                memory.append(json.loads(text)["rss"])
        seen, frames, ended = await watching
        await asyncio.sleep(0.6)
        found = (await client.get(f"/jobs/{job['id']}")).json()
        worst = json.loads(probe.read_text())["worst_ms"]
        print(f"{seen} rows in {frames} frames, job state: {found['state']}")
        print(f"rows/s: {seen / (ended - started):,.0f} at the watcher, {found['rows_per_second']:,} for the job")
        print(f"longest event loop pauses, ms: {worst[:8]}")
        half = len(memory) // 2
        print(f"peak memory, MiB: 1st half {max(memory[:half]) / 2**20:.1f}, 2nd half {max(memory[half:]) / 2**20:.1f}")


if __name__ == "__main__":
    with running() as service:
        asyncio.run(measure(service, argument(1, 200_000)))
