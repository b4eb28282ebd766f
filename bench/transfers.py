"""Measure exports and imports: rows per second, processor time, pauses of the event loop, and memory.

python -m bench.transfers [rows] [database URL]
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import httpx

from bench.service import Service, argument, cpu_seconds, running, signed_in

EXPORTS = ("format=ndjson", "format=csv", "format=csv&safe=true", "format=csv&sort=-rating,title")
FIELDS = "title,description,release_date,rating,duration_minutes,status,budget,revenue,country,languages,genres"


async def _ended(client: httpx.AsyncClient, job: str) -> None:
    while (await client.get(f"/jobs/{job}")).json()["state"] in ("queued", "running"):
        await asyncio.sleep(0.1)


def _report(service: Service, what: str, rows: int, seconds: float, cpu: float) -> None:
    found = json.loads(service.probe.read_text())
    print(
        f"{what}: {rows / seconds:,.0f} rows/s, {rows / cpu:,.0f} rows per second of processor time of the service, "
        f"longest pauses {found['worst_ms'][:3]} ms, memory {found['rss'] / 2**20:.0f} MiB"
    )


async def _download(client: httpx.AsyncClient, query: str) -> int:
    lines = 0
    async with client.stream("GET", f"/movies/export?{query}", headers={"Accept-Encoding": "identity"}) as answer:
        async for part in answer.aiter_raw():
            lines += part.count(b"\n")
    return lines


async def measure(service: Service, rows: int) -> None:
    async with signed_in(service) as client:
        await _ended(client, (await client.post(f"/movies/generate/{rows}")).json()["id"])
        for query in EXPORTS:
            service.probe.unlink(missing_ok=True)
            started, cpu = time.monotonic(), cpu_seconds(service.pid)
            lines = await _download(client, query)
            seconds, cpu = time.monotonic() - started, cpu_seconds(service.pid) - cpu
            await asyncio.sleep(0.6)  # the probe writes its results twice a second
            _report(service, f"export {query}", lines, seconds, cpu)
        file = (await client.get(f"/movies/export?format=csv&fields={FIELDS}")).content
        service.probe.unlink(missing_ok=True)
        headers = {"Content-Type": "text/csv"}
        cpu = cpu_seconds(service.pid)
        job = (await client.post("/movies/import", content=file, headers=headers, timeout=600)).json()["id"]
        started = time.monotonic()
        await _ended(client, job)
        seconds, cpu = time.monotonic() - started, cpu_seconds(service.pid) - cpu
        await asyncio.sleep(0.6)
        _report(service, f"import of {len(file) / 1e6:.0f} MB of CSV", rows, seconds, cpu)


if __name__ == "__main__":
    settings = {"RATE_LIMITS": "off"} | ({"DATABASE_URL": sys.argv[2]} if len(sys.argv) > 2 else {})
    with running(settings=settings) as service:
        asyncio.run(measure(service, argument(1, 200_000)))
