"""The live scenarios: random writes to the real service while the client's connections are cut.

At the end, the client's views and events are compared with the REST lists and the event log.
"""

from __future__ import annotations

import asyncio
import json
import random
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlencode, urlsplit

from websockets.asyncio.client import connect

from .driver import DriverFailed
from .runner import RETRY, Outcome, Runner
from .scenario import Live, Step, difference

READY_SECONDS = 20.0
SETTLE_SECONDS = 20.0
POLL_SECONDS = 0.05
MAX_FRAME_BYTES = 16 * 1024 * 1024
GENRES = ("Drama", "Comedy", "Noir")
STATES = ("released", "planned", "rumored")


class CuttingProxy:
    """A proxy to the service. Cuts each client connection after a random number of bytes, unless `is_calm` is set."""

    def __init__(self, host: str, port: int, chance: random.Random, cut_after_bytes: tuple[int, int]) -> None:
        self._address = (host, port)
        self._chance = chance
        self._range = cut_after_bytes
        self.is_calm = True  # no cuts before the first snapshot, which may be larger than `cut_after_bytes`
        self.cuts = 0

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Listen, and yield the port."""
        tasks: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            tasks.add(asyncio.ensure_future(self._relay(reader, writer)))

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = self._chance.randint(*self._range)
        upstream: asyncio.StreamWriter | None = None
        try:
            replies, upstream = await asyncio.open_connection(*self._address)
            up = asyncio.create_task(self._copy(reader, upstream))
            try:
                while data := await replies.read(4096):
                    if not self.is_calm:
                        if len(data) >= left:
                            writer.write(data[:left])  # the bytes after the cut are dropped
                            self.cuts += 1
                            return
                        left -= len(data)
                    writer.write(data)
                    await writer.drain()
            finally:
                up.cancel()
        except OSError:
            pass
        finally:
            for each in (writer, upstream):
                if each is not None:
                    each.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(4096):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.transport.abort()


class Rest:
    """The REST API, as one signed-in user."""

    def __init__(self, base: str) -> None:
        self._base = base
        self.token = ""

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request and return the body of the response. Raises RuntimeError unless the request succeeds."""
        return await asyncio.to_thread(self._ask, method, path, body)

    def _ask(self, method: str, path: str, body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, headers, method=method)  # noqa: S310 (from the command line)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{method} {path}: {error.code} {error.read()[:500]!r}") from error
        return json.loads(text) if text else None

    async def sign_up(self, name: str) -> None:
        person = {"username": name, "password": "third man 1949"}
        await self.ask("POST", "/auth/register", person)
        self.token = (await self.ask("POST", "/auth/login", person))["access_token"]

    async def every(self, topic: str, filter_: Mapping[str, Any], q: str = "") -> list[Any]:
        """Return all rows of a topic that match the filter and that the search `q` finds, sorted by id."""
        rows: list[Any] = []
        while True:
            after = rows[-1]["id"] if rows else 0
            query = urlencode([("after", after), ("limit", 1000), ("q", q), *query_of(filter_)])
            page = await self.ask("GET", f"/{topic}?{query}")
            rows.extend(page)
            if len(page) < 1000:
                return rows


def query_of(filter_: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the query parameters of a filter."""
    for field, wanted in filter_.items():
        if field == "or":
            for index, group in enumerate(wanted):
                for name, value in query_of(group):
                    head, bracket, rest = name.partition("[")
                    yield f"or[{index}][{head}]{bracket}{rest}", value
        elif isinstance(wanted, Mapping):
            for operator, value in wanted.items():
                yield f"{field}[{operator}]", ",".join(map(str, value)) if isinstance(value, list) else value
        else:
            yield field, wanted


async def run_live(runner: Runner, live: Live, service: str, seed: int | None = None) -> Outcome:
    """Run a live scenario. It registers a new user at `service` (a URL) and adds movies and characters."""
    seed = random.randrange(10**9) if seed is None else seed
    chance = random.Random(seed)
    rest = Rest(service.rstrip("/"))
    await rest.sign_up(f"conformance-{seed}-{random.SystemRandom().randrange(10**9)}")
    parts = urlsplit(service)
    proxy = CuttingProxy(parts.hostname or "", parts.port or 80, chance, live.cut_after_bytes)
    client = runner.new_client()
    try:
        async with proxy.listening() as port:
            url = f"ws://127.0.0.1:{port}/ws"
            await runner.driver.tell(client, do="open", url=url, token=rest.token, retry=dict(RETRY))
            try:
                problem = await _run(runner, live, rest, proxy, chance, client, service)
            finally:
                await runner.driver.tell(client, do="close")
    except (DriverFailed, RuntimeError) as error:
        problem = repr(error)
    if problem is None and proxy.cuts == 0:
        problem = "no connection was cut, so the run proves nothing"
    return Outcome(live.name, problem and f"seed {seed}, {proxy.cuts} connections cut: {problem}")


async def _run(
    runner: Runner, live: Live, rest: Rest, proxy: CuttingProxy, chance: random.Random, client: str, service: str
) -> str | None:
    async def report() -> Mapping[str, Any]:
        found: Mapping[str, Any] = await runner.driver.tell(client, do="report")
        return found

    for step in live.start:
        await runner.driver.tell(client, **step)
    views = {step["name"]: step for step in live.start if step["do"] == "view"}
    watches = {step["name"]: step for step in live.start if step["do"] == "watch"}
    is_ready = {"ready": True}
    wanted: dict[str, Any] = {"views": dict.fromkeys(views, is_ready), "watches": dict.fromkeys(watches, is_ready)}
    if (problem := await _until(report, wanted, READY_SECONDS)) is not None:
        return f"the client did not become ready: {problem}"
    proxy.is_calm = False
    begun = {name: each["position"] for name, each in (await report())["watches"].items()}
    for number in range(live.requests):
        body = {"title": f"request {number}", "rating": chance.randint(1, 100)}
        await runner.driver.tell(
            client, do="request", name=f"r{number}", method="POST", path="/movies", body=body,
            idempotency_key=f"key-{client}-{number}",
        )  # fmt: skip
    await _write(rest, chance, live.writes)
    if live.requests:
        done = {"requests": {f"r{number}": {"status": 201} for number in range(live.requests)}}
        if (problem := await _until(report, done, SETTLE_SECONDS)) is not None:
            return problem
    proxy.is_calm = True
    expected: dict[str, Any] = {"views": {}, "watches": {}}
    for name, step in views.items():
        rows = await rest.every(step["topic"], step.get("filter", {}), step.get("q", ""))
        expected["views"][name] = {"rows": rows, "error": None}
    for name, step in watches.items():
        expected["watches"][name] = {"events": await _events(service, step, begun[name]), "error": None}
    if (problem := await _until(report, expected, SETTLE_SECONDS)) is not None:
        return problem
    if live.requests:
        titles = [row["title"] for row in await rest.every("movies", {"title": {"prefix": "request "}})]
        found = await report()
        ids = {each["body"]["id"] for each in found["requests"].values()}
        if len(ids) != live.requests or len(titles) % live.requests:
            return f"expected {live.requests} movies, got {len(ids)} responses and {len(titles)} rows"
    return None


async def _until(report: Any, wanted: Mapping[str, Any], seconds: float) -> str | None:
    """Poll until the report is as expected. Return None or, after `seconds`, the remaining difference."""
    end = asyncio.get_running_loop().time() + seconds
    while True:
        problem = difference(wanted, await report())
        if problem is None or asyncio.get_running_loop().time() > end:
            return problem
        await asyncio.sleep(POLL_SECONDS)


async def _events(service: str, step: Step, begun: str) -> list[Mapping[str, Any]]:
    """Return the events that the watch must have seen, read over a connection that is not cut."""
    epoch, _, since = begun.rpartition(":")
    base = service.replace("http", "ws", 1).rstrip("/") + "/ws"
    topics = ",".join(step["topics"])
    async with connect(f"{base}?topics={topics}", max_size=MAX_FRAME_BYTES) as now:
        head = json.loads(await now.recv())["data"]["seq"]
    events: list[Mapping[str, Any]] = []
    query = urlencode({"topics": topics, "since": since, "epoch": epoch})
    async with connect(f"{base}?{query}", max_size=MAX_FRAME_BYTES) as socket:
        try:
            async with asyncio.timeout(1.0) as patience:
                while not events or events[-1]["seq"] < head:
                    frame = json.loads(await socket.recv())
                    if "seq" in frame:
                        events.append(
                            {name: frame.get(name) for name in ("operation", "topic", "seq", "data", "changed")}
                        )
                        patience.reschedule(asyncio.get_running_loop().time() + 1.0)
        except TimeoutError:
            pass  # no event for a second: the newest events are on other topics or private to other users
    return [{**event, "changed": event["changed"] or []} for event in events]


async def _write(rest: Rest, chance: random.Random, writes: int) -> None:
    """Add, change and delete rows at random, singly and in bulk, so that rows also enter and leave filters."""
    movies: list[int] = []
    characters: list[int] = []
    known = await rest.ask("GET", "/genres/names?limit=1000")
    genres = [name for name in GENRES if name in known]  # only moderators and admins may add the others

    def movie() -> dict[str, Any]:
        return {
            "title": f"Movie {chance.randrange(10**6)}",
            "description": "x" * chance.randrange(400),
            "rating": chance.randint(1, 100),
            "status": chance.choice(STATES),
            "genres": chance.sample(genres, min(len(genres), chance.randint(0, 2))),
        }

    def some() -> Sequence[int]:
        return chance.sample(movies, min(len(movies), chance.randint(2, 12)))

    for _ in range(writes):
        kind = chance.choice(
            ("add", "add", "edit", "edit", "edit", "delete", "add_bulk", "edit_bulk", "delete_bulk", "character")
        )
        if kind == "add" or not movies:
            movies.append((await rest.ask("POST", "/movies", movie()))["id"])
        elif kind == "edit":
            field = chance.choice(("rating", "status", "genres"))
            await rest.ask("PATCH", f"/movies/{chance.choice(movies)}", {field: movie()[field]})
        elif kind == "delete":
            await rest.ask("DELETE", f"/movies/{movies.pop(chance.randrange(len(movies)))}")
        elif kind == "add_bulk":
            added = await rest.ask("POST", "/movies/bulk", [movie() for _ in range(chance.randint(2, 40))])
            movies.extend(row["id"] for row in added["added"])
        elif kind == "edit_bulk":
            await rest.ask("PATCH", "/movies/bulk", [{"id": key, "rating": chance.randint(1, 100)} for key in some()])
        elif kind == "delete_bulk":
            gone = some()
            await rest.ask("DELETE", "/movies/bulk", {"ids": list(gone)})
            movies = [key for key in movies if key not in gone]
        elif characters and chance.random() < 0.3:
            await rest.ask("DELETE", f"/characters/{characters.pop()}")
        else:
            body = {"name": f"Harry {chance.randrange(10**6)}", "movie_id": chance.choice(movies)}
            characters.append((await rest.ask("POST", "/characters", body))["id"])
