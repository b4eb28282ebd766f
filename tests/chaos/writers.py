"""The writers of the chaos run: each carries out a plan that depends only on the seed, whatever fails.

A write whose outcome is unknown is sent again until there is a response: a POST with the same `Idempotency-Key`, other
methods unchanged, because they are idempotent.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.support.service import PASSWORD, Service, eventually

GENRES = ("Drama", "Noir", "Comedy", "Western", "Horror")
STATUSES = ("released", "in_production", "announced")
SHARES = {
    "add": 36,
    "add_character": 9,
    "edit": 27,
    "replace": 5,
    "edit_character": 4,
    "remove": 7,
    "remove_character": 2,
    "add_many": 5,
    "edit_many": 3,
    "remove_many": 2,
    "generate": 0.6,
}
TRY_AGAIN = (408, 429, 500, 502, 503, 504)
PATIENCE_SECONDS = 90.0
REQUEST_SECONDS = 15.0


@dataclass(frozen=True)
class Operation:
    """A write. `worker` and `pick`, from 0 to 1, select a worker and one of the rows that the writer has by then."""

    name: str
    kind: str
    worker: float
    pick: float
    body: Any = None


def movie(name: str, chance: random.Random) -> dict[str, Any]:
    return {
        "title": f"{chance.choice(('The', 'A', 'der'))} film {name}",
        "description": "x" * chance.choice((0, 20, 300)) or None,
        "rating": chance.choice((None, *range(1, 101, 7))),
        "status": chance.choice((None, *STATUSES)),
        "genres": chance.sample(GENRES, chance.randint(0, 3)),
        "release_date": chance.choice((None, f"{chance.randint(1930, 2020)}-0{chance.randint(1, 9)}-15")),
        "budget": chance.choice((None, chance.randint(0, 10**9))),
    }


def edit(chance: random.Random) -> dict[str, Any]:
    whole = movie(f"edited {chance.randrange(10**6)}", chance)
    return {name: whole[name] for name in chance.sample(sorted(whole), chance.randint(1, 3))}


def plan(seed: int, writer: int, count: int) -> list[Operation]:
    """Return the operations of this writer; a pure function of the arguments."""
    chance = random.Random(f"writer {seed} {writer}")
    found = []
    for number, kind in enumerate(chance.choices(list(SHARES), list(SHARES.values()), k=count)):
        name = f"{seed}-{writer}-{number}"
        body: Any = None
        if kind in ("add", "replace"):
            body = movie(name, chance)
        elif kind in ("add_character", "edit_character"):
            body = {"name": f"character {name}", "description": chance.choice((None, "a villain"))}
        elif kind == "edit":
            body = edit(chance)
        elif kind == "add_many":
            body = [movie(f"{name}-{index}", chance) for index in range(chance.choice((2, 10, 40, 120)))]
        elif kind == "edit_many":
            body = [edit(chance) for _ in range(chance.choice((2, 10, 30)))]
        elif kind == "remove_many":
            body = chance.choice((2, 10, 30))
        elif kind == "generate":
            body = (chance.choice((200, 1_000, 6_000)), chance.choice((100, 500)), chance.randrange(10**9))
        found.append(Operation(name, kind, chance.random(), chance.random(), body))
    return found


@dataclass
class Progress:
    """The number of writes that all writers together have begun; each fault waits until a certain number is reached."""

    begun: int = 0
    again: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def begin_one(self) -> None:
        async with self._changed:
            self.begun += 1
            self._changed.notify_all()

    async def reaches(self, number: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.begun >= number)


async def jobs_end(http: httpx.AsyncClient, service: Service, seconds: float) -> None:
    async def have_ended() -> bool:
        answers = [await http.get(f"{service.url}/jobs?state={state}") for state in ("queued", "running")]
        return all(answer.status_code == 200 and not answer.json() for answer in answers)

    await eventually(have_ended, "all jobs end", seconds)


async def sign_up(index: int, services: Sequence[Service], http: httpx.AsyncClient) -> str:
    """Register a user for a writer, sign in, and return the access token."""
    base = services[index % len(services)].url
    named = {"username": f"writer{index}", "password": PASSWORD}
    (await http.post(f"{base}/auth/register", json=named)).raise_for_status()
    token: str = (await http.post(f"{base}/auth/login", json=named)).raise_for_status().json()["access_token"]
    return token


class Writer:
    """A signed-in user who writes. `promised` holds the rows that successful POST requests returned."""

    def __init__(
        self, services: Sequence[Service], http: httpx.AsyncClient, token: str, progress: Progress, pause: float
    ) -> None:
        self.promised: list[tuple[str, dict[str, Any]]] = []
        self._services = services
        self._http = http
        self._headers = {"Authorization": f"Bearer {token}"}
        self._progress = progress
        self._pause = pause
        self._movies: list[int] = []
        self._characters: list[int] = []
        self._chance = random.Random(token)

    async def run(self, operations: Sequence[Operation], enough: asyncio.Event | None = None) -> None:
        """Carry out all operations, or stop early when `enough` is set."""
        for operation in operations:
            if enough is not None and enough.is_set():
                return
            due = time.monotonic() + self._pause
            await self._progress.begin_one()
            await self._do(operation)
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def end(self) -> None:
        """Add movies of which each watcher's filter matches at least one, so that every filtered stream has an end."""
        for status in STATUSES:
            body = {"title": f"The film {status}", "rating": 85, "genres": ["Drama", "Noir"], "status": status}
            await self._add(Operation(f"the end, {status}", "add", 0.0, 0.0), "movies", body)

    async def _do(self, operation: Operation) -> None:
        kind, body = operation.kind, operation.body
        if kind == "add" or (kind not in ("add_many", "generate") and not self._movies):
            await self._add(operation, "movies", body if kind == "add" else {"title": f"film {operation.name}"})
        elif kind == "add_character":
            await self._add(operation, "characters", body | {"movie_id": self._some(operation)[0]})
        elif kind in ("edit_character", "remove_character"):
            if self._characters:
                index = int(operation.pick * len(self._characters))
                path = f"/characters/{self._characters[index]}"
                if kind == "edit_character":
                    await self._send(operation, "PATCH", path, body)
                else:
                    del self._characters[index]
                    await self._send(operation, "DELETE", path)
        elif kind in ("edit", "replace"):
            method = "PATCH" if kind == "edit" else "PUT"
            await self._send(operation, method, f"/movies/{self._some(operation)[0]}", body)
        elif kind == "remove":
            await self._send(operation, "DELETE", f"/movies/{self._take(operation, 1)[0]}")
        elif kind == "remove_many":
            await self._send(operation, "DELETE", "/movies/bulk", {"ids": self._take(operation, body)})
        elif kind == "edit_many":
            rows = [{"id": id_, **change} for id_, change in zip(self._some(operation, len(body)), body, strict=False)]
            await self._send(operation, "PATCH", "/movies/bulk", rows)
        elif kind == "add_many":
            answer = await self._send(operation, "POST", "/movies/bulk", body)
            if answer.status_code == 201:
                added = answer.json()["added"]
                self.promised += [("movies", row) for row in added]
                self._movies += [row["id"] for row in added]
        else:
            number, batch, seed = body
            await self._send(operation, "POST", f"/movies/generate/{number}?batch_size={batch}&seed={seed}")

    async def _add(self, operation: Operation, topic: str, body: Any) -> None:
        answer = await self._send(operation, "POST", f"/{topic}", body)
        if answer.status_code == 201:
            row = answer.json()
            self.promised.append((topic, row))
            (self._movies if topic == "movies" else self._characters).append(row["id"])

    def _some(self, operation: Operation, count: int = 1) -> list[int]:
        start = int(operation.pick * len(self._movies))
        return self._movies[start : start + count]

    def _take(self, operation: Operation, count: int) -> list[int]:
        taken = self._some(operation, count)
        self._movies = [id_ for id_ in self._movies if id_ not in taken]
        return taken

    async def _send(self, operation: Operation, method: str, path: str, body: Any = None) -> httpx.Response:
        """Send a request to one worker after another until there is a final response, and return it."""
        headers = self._headers | ({"Idempotency-Key": operation.name} if method == "POST" else {})
        first = int(operation.worker * len(self._services))
        deadline = time.monotonic() + PATIENCE_SECONDS
        attempt = 0
        while True:
            service = self._services[(first + attempt) % len(self._services)]
            try:
                answer = await self._http.request(method, service.url + path, json=body, headers=headers)
                self._progress.statuses[answer.status_code] += 1
                if answer.status_code not in TRY_AGAIN:
                    return answer
                reason = answer.text
            except httpx.TransportError as error:
                reason = repr(error)
            if time.monotonic() > deadline:
                raise AssertionError(f"{method} {path}: no final response in {PATIENCE_SECONDS} s: {reason}")
            attempt += 1
            self._progress.again += 1
            await asyncio.sleep(self._chance.uniform(0.05, 0.3))
