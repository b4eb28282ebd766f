"""`Stream-Position`: the log position that a list reflects, so that listing and then watching misses no event."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import orjson

from core.settings import Settings
from main import build_app
from repository.engine.events import Head
from repository.engine.positions import parse_position
from routes import table
from tests.support.resources import sql
from tests.support.service import Person, Service, Watcher
from tests.support.sockets import subscribed

LISTS_OF_ALL = [
    *(f"/{name}{rest}" for name in ("movies", "characters") for rest in ("", "/names", "/count")),
    "/jobs",
]
FILTER = "&rating[gte]=50"
LISTINGS = 8
EVENTS_BETWEEN = 15


def position_of(headers: Mapping[str, str]) -> Head:
    found = parse_position(headers["stream-position"])
    assert found is not None, headers["stream-position"]
    return found


@dataclass
class Strict:
    """A copy of a list. It rejects events that do not fit, such as adding an existing row or deleting a missing one."""

    rows: dict[int, dict[str, Any]]
    seq: int
    seen: int = field(default=0)

    def apply(self, event: dict[str, Any]) -> None:
        assert event["seq"] >= self.seq, f"{event['seq']} after {self.seq}"
        operation, data = event["operation"], event["data"]
        items = data.get("items") or [{"id": each} for each in data.get("ids", [])] or [data]
        for row in items:
            assert (row["id"] in self.rows) == (not operation.startswith("add")), (event["seq"], operation, row["id"])
            if operation.startswith("delete"):
                del self.rows[row["id"]]
            else:
                self.rows[row["id"]] = row
        if not event.get("more"):
            assert event["seq"] > self.seq
            self.seq = event["seq"]
            self.seen += 1


class Writer:
    """A client that constantly adds, edits and deletes movies, singly and in bulk, and keeps the list short."""

    def __init__(self, alice: Person, seed: int) -> None:
        self._http = alice.http
        self._dice = random.Random(seed)
        self._own: list[int] = []
        self.is_over = False

    async def run(self) -> None:
        while not self.is_over:
            await self._dice.choice((self._add, self._add, self._edit, self._delete, self._bulk))()

    async def _ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = await self._http.request(method, path, json=body)
        assert answer.status_code < 300, answer.text
        return answer.json() if answer.content else None

    def _some(self, most: int) -> list[int]:
        return self._dice.sample(self._own, min(len(self._own), self._dice.randint(1, most)))

    def _rating(self) -> int:
        return self._dice.randint(1, 100)

    async def _add(self) -> None:
        body = {"title": f"movie {self._dice.random()}", "rating": self._rating()}
        self._own.append((await self._ask("POST", "/movies", body))["id"])

    async def _edit(self) -> None:
        for each in self._some(1):
            await self._ask("PATCH", f"/movies/{each}", {"rating": self._rating()})

    async def _delete(self) -> None:
        for each in self._some(1):
            self._own.remove(each)
            await self._ask("DELETE", f"/movies/{each}")

    async def _bulk(self) -> None:
        if len(self._own) < 40:
            rows = [{"title": "one of many", "rating": self._rating()} for _ in range(self._dice.randint(1, 10))]
            self._own += [row["id"] for row in (await self._ask("POST", "/movies/bulk", rows))["added"]]
        elif self._dice.random() < 0.5:
            edits = [{"id": each, "rating": self._rating()} for each in self._some(20)]
            await self._ask("PATCH", "/movies/bulk", edits)
        else:
            gone = self._some(20)
            self._own = [each for each in self._own if each not in gone]
            await self._ask("DELETE", "/movies/bulk", {"ids": gone})


@asynccontextmanager
async def writing(alice: Person) -> AsyncIterator[None]:
    writers = [Writer(alice, seed) for seed in range(4)]
    running = asyncio.gather(*(writer.run() for writer in writers))
    try:
        yield
    finally:
        for writer in writers:
            writer.is_over = True
        await running


async def follow(watcher: Watcher, copy: Strict, until: int) -> None:
    """Apply all events up to the number `until`, the last one in the log."""
    while copy.seq < until:
        frame = await watcher.next()
        if "seq" in frame:
            copy.apply(frame)


async def list_of(person: Person, query: str = "") -> tuple[dict[int, dict[str, Any]], Head]:
    answer = await person.http.get(f"/movies?limit=1000{query}")
    assert answer.status_code == 200, answer.text
    rows = {row["id"]: row for row in answer.json()}
    assert len(rows) == int(answer.headers["x-total-count"]), "rows and total are from one snapshot"
    return rows, position_of(answer.headers)


async def test_a_list_plus_the_events_after_it_equals_the_final_list(new_service: Callable[..., Service]) -> None:
    """Also check filtered lists (with the events of their filter) and counts."""
    service = new_service().start()
    async with service.person() as alice:
        listed: list[Strict] = []
        filtered: list[Strict] = []
        counted: list[tuple[int, int]] = []
        async with writing(alice):
            while len(listed) < LISTINGS:
                rows, head = await list_of(alice)
                if not listed or head.seq > listed[-1].seq + EVENTS_BETWEEN:
                    listed.append(Strict(rows, head.seq))
                    rows, head = await list_of(alice, FILTER)
                    filtered.append(Strict(rows, head.seq))
                    answer = await alice.http.get("/movies/count")
                    counted.append((answer.json()["count"], position_of(answer.headers).seq))
        # Add an event to wait for, whatever the writer did last.
        await alice.add(title="the end", rating=100)
        expected, head = await list_of(alice)
        for copy in listed:
            async with service.watch(f"topics=movies&since={copy.seq}&epoch={head.epoch}") as watcher:
                await follow(watcher, copy, head.seq)
            assert copy.rows == expected
        assert listed[0].seen >= (LISTINGS - 1) * EVENTS_BETWEEN, "the lists were read while movies were written"
        matching, _ = await list_of(alice, FILTER)
        for copy in filtered:
            async with service.watch("topics=jobs") as watcher:
                wanted: dict[str, Any] = {"topics": ["movies"], "filter": {"rating": {"gte": 50}}}
                data = await subscribed(watcher, since=copy.seq, epoch=head.epoch, **wanted)
                assert data["seq"] == copy.seq
                await follow(watcher, copy, head.seq)
            assert copy.rows == matching
        for count, seq in counted:
            async with service.watch(f"topics=movies&since={seq}&epoch={head.epoch}&bulk=summary") as watcher:
                await watcher.until_seq(head.seq)
            for event in watcher.events:
                sign = {"add": 1, "delete": -1}.get(event["operation"].removesuffix("_bulk"), 0)
                count += sign * event["data"].get("count", 1)
            assert count == len(expected)


async def test_every_list_carries_the_number_of_the_last_event(service: Service) -> None:
    async with service.admin() as chief, service.watch("topics=movies") as watcher:
        movie = await chief.add()
        await watcher.until(lambda frame: frame.get("data") == movie)
        own = [
            path
            for name in ("movies", "characters")
            for path in (f"/{name}/user", f"/{name}/username/{chief.name}", f"/users/{chief.id}/{name}")
        ]
        for path in (*LISTS_OF_ALL, *own, "/users/nonAdmin", "/auth/sessions"):
            for query in ("", "?limit=0", "?offset=1000000"):
                if path.endswith("/count") and query:
                    continue
                answer = await chief.http.get(path + query)
                assert answer.status_code == 200, answer.text
                head = position_of(answer.headers)
                assert head == Head(watcher.welcome["data"]["epoch"], watcher.events[-1]["seq"]), path + query


async def test_a_write_tells_the_position_of_its_last_event(service: Service) -> None:
    """A stream that has reached the position has shown the write. A write without an event returns the log's head."""
    async with service.person() as alice, service.watch("topics=movies,jobs") as watcher:

        async def told(method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Head:
            answer = await alice.http.request(method, path, json=body, headers=headers)
            assert answer.is_success, answer.text
            return position_of(answer.headers)

        async def arrives(position: Head, operation: str) -> dict[str, Any]:
            await watcher.until_seq(position.seq)
            assert (watcher.events[-1]["operation"], watcher.events[-1]["seq"]) == (operation, position.seq)
            assert position.epoch == watcher.welcome["data"]["epoch"]
            data: dict[str, Any] = watcher.events[-1]["data"]
            return data

        movie = await arrives(await told("POST", "/movies", {"title": "M"}), "add")
        path = f"/movies/{movie['id']}"
        edited = await told("PATCH", path, {"title": "N"})
        await arrives(edited, "update")
        assert (await told("PATCH", path, {"title": "N"})).seq >= edited.seq, "without a change, the head is returned"
        await arrives(await told("DELETE", path), "delete")
        await arrives(
            await told("POST", "/movies/bulk", [{"title": "x" * 200, "description": "y" * 9_000}] * 200), "add_bulk"
        )
        nothing = await told("POST", "/movies/bulk?on_error=skip", [{}])
        assert nothing.seq >= watcher.events[-1]["seq"]
        key = {"Idempotency-Key": f"position-{alice.id}"}
        first = await told("POST", "/movies", {"title": "once"}, key)
        await arrives(first, "add")
        await alice.add(title="another")
        assert await told("POST", "/movies", {"title": "once"}, key) == first
        job = await told("POST", "/movies/generate/1")
        assert job.seq > first.seq


async def test_a_replayed_response_does_not_tell_a_position_of_a_replaced_log(
    new_service: Callable[..., Service],
) -> None:
    service = new_service().start()
    async with service.person() as alice:
        key = {"Idempotency-Key": "before-the-restore"}
        first = await alice.http.post("/movies", json={"title": "once"}, headers=key)
        await sql(service, "UPDATE event_head SET epoch = 'another'")
        again = await alice.http.post("/movies", json={"title": "once"}, headers=key)
        assert (again.status_code, again.json()) == (201, first.json())
        assert position_of(first.headers).epoch != "another"
        assert position_of(again.headers) == Head("another", position_of(first.headers).seq)


def test_every_list_promises_its_position() -> None:
    document = orjson.loads(table.document())
    for path, item in document["paths"].items():
        headers = item.get("get", {}).get("responses", {}).get("200", {}).get("headers", {})
        assert ("X-Total-Count" in headers) <= ("Stream-Position" in headers), path
        assert path.endswith("/count") <= ("Stream-Position" in headers), path


async def test_pages_of_other_origins_may_read_it_and_resume(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/marquee.db"
    settings = Settings(database_url=url, allowed_origins=("https://app.example",), _env_file=None)
    transport = httpx.ASGITransport(app=build_app(settings))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as page:
        asked = {
            "Origin": "https://app.example",
            "Access-Control-Request-Method": "GET",
            "Access-Control-Request-Headers": "last-event-id",
        }
        assert (await page.options("/events", headers=asked)).status_code == 200
        answer = await page.get("/nowhere", headers={"Origin": "https://app.example"})
        assert "Stream-Position" in answer.headers["access-control-expose-headers"].split(", ")
