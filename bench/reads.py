"""Measure lists, counts, searches and votes on a large catalog that `bench.catalog` has made.

python -m bench.reads DATABASE_URL [requests of each kind]

A single client sends the requests one by one, in random order. Then 50 users rate one movie at once.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial

import httpx

from bench.service import PASSWORD, Service, argument, client_of, running

VOTERS = 50
VOTES_PER_USER = 20
SORTS = ("title", "-release_date", "-average_rating", "-ratings_count", "rating", "-budget", "-created_at", "-id")
Make = Callable[[random.Random], str]
FILTERS: Mapping[str, Make] = {
    "genre=": lambda chance: f"genre=Genre%20{chance.randrange(20)}",
    "status=": lambda chance: f"status={chance.choice(('announced', 'in_production'))}",
    "country=": lambda chance: f"country={chance.choice(('FR', 'US', 'JP'))}",
    "user_id=": lambda chance: f"user_id={chance.randint(1, 10_000)}",
    "rating[gte]=": lambda chance: f"rating[gte]={chance.randint(50, 99)}",
    "release_date[gte]=": lambda chance: f"release_date[gte]={chance.randint(1950, 2020)}-01-01",
}


def words_of(movies: list[dict[str, str]], chance: random.Random, count: int, length: int | None = None) -> str:
    words = chance.choice(movies)["description"].lower().split()
    return "%20".join(word[:length] for word in chance.sample(words, min(count, len(words))))


def _with(path: str, make: Make, chance: random.Random) -> str:
    return path + make(chance)


def kinds_of(movies: list[dict[str, str]]) -> dict[str, Make]:
    """Return what makes a random path of each kind."""
    kinds: dict[str, Make] = {
        "/movies/{id}": lambda chance: f"/movies/{chance.randint(1, len(movies))}",
        "/movies": lambda chance: "/movies?limit=20",
        "/movies/count": lambda chance: "/movies/count",
        "/movies/popular": lambda chance: "/movies/popular?limit=20",
        "/movies/recent": lambda chance: "/movies/recent?limit=20",
        "/genres/{id}/movies": lambda chance: f"/genres/{chance.randint(1, 20)}/movies?limit=20",
        "/movies/{id}/similar": lambda chance: f"/movies/{chance.randint(1, len(movies))}/similar?limit=20",
        "/movies/1/comments": lambda chance: "/movies/1/comments?limit=20",
        "q= of one word": lambda chance: f"/movies?limit=20&q={words_of(movies, chance, 1)}",
        "q= of two words": lambda chance: f"/movies?limit=20&q={words_of(movies, chance, 2)}",
        "q= of a prefix of 3": lambda chance: f"/movies?limit=20&q={words_of(movies, chance, 1, 3)}",
        "characters, q= of one word": lambda chance: f"/characters?limit=20&q={words_of(movies, chance, 1)}",
    }
    for name, make in FILTERS.items():
        kinds[f"/movies?{name}"] = partial(_with, "/movies?limit=20&", make)
        kinds[f"/movies/count?{name}"] = partial(_with, "/movies/count?", make)
    for sort in SORTS:
        kinds[f"/movies?sort={sort}"] = partial(_with, f"/movies?limit=20&sort={sort}", lambda chance: "")
        kinds[f"/movies?genre=&sort={sort}"] = partial(_with, f"/movies?limit=20&sort={sort}&", FILTERS["genre="])
    return kinds


async def read(client: httpx.AsyncClient, requests: int) -> None:
    chance = random.Random(1)
    movies = (await client.get("/movies?limit=1000")).json()
    kinds = kinds_of(movies)
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    plan = [name for name in kinds for _ in range(requests)]
    chance.shuffle(plan)
    failed: dict[str, int] = {}
    for name in plan:
        path = kinds[name](chance)
        started = time.perf_counter()
        answer = await client.get(path)
        if answer.status_code == 200:
            taken[name].append((time.perf_counter() - started) * 1000)
        else:
            failed[name] = failed.get(name, 0) + 1
    print(f"{requests} requests of each kind{'':12}{'median':>10}{'99 %':>10}{'failed':>8}")
    for name, times in taken.items():
        shown = [f"{value:,.1f}" for value in (statistics.median(times), _highest(times))] if times else ["", ""]
        print(f"{name:38}{shown[0]:>10}{shown[1]:>10}{failed.get(name, 0):>8}")


def _highest(times: list[float]) -> float:
    return sorted(times)[min(len(times) - 1, len(times) * 99 // 100)]


async def vote(service: Service) -> None:
    async with AsyncExitStack() as stack:
        clients = []
        for number in range(VOTERS):
            client = await stack.enter_async_context(client_of(service))
            account = {"username": f"voter{number}", "password": PASSWORD}
            await client.post("/auth/register", json=account)
            token = (await client.post("/token", data=account)).json()["access_token"]
            client.headers["Authorization"] = f"Bearer {token}"
            clients.append(client)

        async def votes(client: httpx.AsyncClient) -> None:
            for _ in range(VOTES_PER_USER):
                answer = await client.post("/movies/2/ratings", json={"score": random.randint(1, 10)})
                answer.raise_for_status()

        started = time.perf_counter()
        await asyncio.gather(*map(votes, clients))
        print(
            f"{VOTERS} users rate one movie: {VOTERS * VOTES_PER_USER / (time.perf_counter() - started):,.0f} ratings/s"
        )


async def measure(service: Service, requests: int) -> None:
    async with client_of(service) as client:
        await read(client, requests)
    await vote(service)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    with running(settings={"RATE_LIMITS": "off", "DATABASE_URL": sys.argv[1]}) as service:
        asyncio.run(measure(service, argument(2, 50)))
