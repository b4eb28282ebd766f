"""Compare what requests cost in this checkout and in another one, such as a worktree of an earlier version.

python -m bench.compare OTHER_CHECKOUT [rounds] [rows]

Both services run at the same time, and every round measures both, so that slow phases of the machine affect both alike.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import httpx
from websockets.asyncio.client import ClientConnection, connect

from bench.service import PASSWORD, ROOT, Service, argument, cpu_seconds, running, signed_in

MICROSECONDS = 1e6
WATCHERS = 50
Request = Callable[[], Awaitable[httpx.Response]]


async def _drain(socket: ClientConnection) -> None:
    async for _ in socket:
        pass


def _requests(client: httpx.AsyncClient, rows: int) -> dict[str, tuple[Request, int]]:
    """Return the measured requests, each with the number of repetitions in a round."""
    movie = {"title": "The Third Man", "status": "released"}
    ratings = itertools.cycle(range(1, 101))  # a write that changes nothing would cost less
    return {
        "GET /movies/{id}": (partial(client.get, f"/movies/{rows // 2}"), 200),
        "GET /movies?limit=20": (partial(client.get, "/movies?limit=20"), 50),
        "GET /movies?sort=-id&limit=20": (partial(client.get, "/movies?sort=-id&limit=20"), 50),
        "POST /movies": (partial(client.post, "/movies", json=movie), 100),
        "PATCH /movies/{id}": (lambda: client.patch(f"/movies/{rows + 1}", json={"rating": next(ratings)}), 100),
        "POST /token": (partial(client.post, "/token", data={"username": "bench", "password": PASSWORD}), 5),
    }


async def _measure(service: Service, request: Request, times: int) -> float:
    """Return the service's CPU time per request in microseconds."""
    before = cpu_seconds(service.pid)
    for _ in range(times):
        (await request()).raise_for_status()
    await asyncio.sleep(0.02)  # the frames of the last write are still being sent
    return (cpu_seconds(service.pid) - before) / times * MICROSECONDS


async def compare(other: Path, rounds: int, rows: int) -> None:
    async with AsyncExitStack() as stack:
        measured: dict[str, list[tuple[float, float]]] = {}
        services, requests = [], []
        for root in (other, ROOT):
            service = stack.enter_context(running(settings={"RATE_LIMITS": "off"}, root=root))
            client = await stack.enter_async_context(signed_in(service))
            await _generate(client, rows)
            (await client.post("/movies", json={"title": "The bench's own"})).raise_for_status()
            services.append(service)
            requests.append(_requests(client, rows))
        for watchers in (0, WATCHERS):
            for service in services:
                for _ in range(watchers):
                    url = f"ws://127.0.0.1:{service.port}/ws?topics=movies"
                    socket = await stack.enter_async_context(connect(url, compression=None))
                    drain = asyncio.create_task(_drain(socket))
                    stack.callback(drain.cancel)
            for number in range(rounds):
                for name in requests[0]:
                    if watchers and not name.startswith("POST /movies"):
                        continue
                    pair = {}
                    for side in (0, 1) if number % 2 else (1, 0):
                        pair[side] = await _measure(services[side], *requests[side][name])
                    label = f"{name}, {watchers} watchers" if watchers else name
                    measured.setdefault(label, []).append((pair[0], pair[1]))
        print(
            f"{rows:,} rows, {rounds} rounds; CPU µs per request, as medians before and after, and ratios after/before"
        )
        print(f"{'':33}{'before':>8}{'after':>8}{'of medians':>12}{'of minima':>12}")
        for name, pairs in measured.items():
            sides = [[pair[side] for pair in pairs] for side in (0, 1)]
            before, after = (statistics.median(side) for side in sides)
            lowest = min(sides[1]) / min(sides[0])
            print(f"{name:33}{before:>8.0f}{after:>8.0f}{after / before:>12.3f}{lowest:>12.3f}")


async def _generate(client: httpx.AsyncClient, rows: int) -> None:
    left = rows
    while left:
        batch = min(left, 200_000)
        job = (await client.post(f"/movies/generate/{batch}")).raise_for_status().json()
        while (await client.get(f"/jobs/{job['id']}")).json()["state"] != "done":
            await asyncio.sleep(0.2)
        left -= batch


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    asyncio.run(compare(Path(sys.argv[1]).resolve(), argument(2, 20), argument(3, 20_000)))
