"""`GET /events`: the log in pages and as server-sent events, for clients without a websocket."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from core.error_bodies import prefers
from realtime.sse.replay import PAGE_BYTES
from repository.engine.events import Head
from repository.engine.positions import parse_position
from repository.engine.transaction import Transaction
from routes.events import EVENT_STREAM
from tests.support.backends import SQLITE_ONLY
from tests.support.event_logs import database_of, prune
from tests.support.frames_checked import check_frame
from tests.support.servers.postgresql import PostgresServer
from tests.support.service import DEADLINE_SECONDS, PASSWORD, Person, Service, eventually
from tests.support.sockets import request, signed_in

STREAM = {"Accept": "text/event-stream"}


@dataclass
class Stream:
    """A reader of server-sent events (WHATWG HTML, section 9.2.6) that checks their frames against the schema."""

    response: httpx.Response
    lines: AsyncIterator[str]
    last_id: str = ""
    retry: int | None = None
    comments: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def seqs(self) -> list[int]:
        return [event["seq"] for event in self.events]

    async def next(self, seconds: float = DEADLINE_SECONDS) -> dict[str, Any]:
        """Return the next frame. Raise StopAsyncIteration when the stream ends without an error."""
        data: list[str] = []
        event_id = self.last_id
        async with asyncio.timeout(seconds):
            while line := await anext(self.lines) or not data:
                if line is True:
                    self.last_id = event_id  # in a block without data, only the id counts
                    continue
                name, _, value = line.partition(":")
                value = value.removeprefix(" ")
                match name:
                    case "":
                        self.comments += 1
                    case "data":
                        data.append(value)
                    case "id":
                        event_id = value
                    case "retry":
                        self.retry = int(value)
                    case _:
                        raise AssertionError(line)
        self.last_id = event_id
        frame: dict[str, Any] = json.loads("\n".join(data))
        check_frame(frame)
        if "seq" in frame:
            self.events.append(frame)
        return frame

    async def expect(self, operation: str, **members: Any) -> dict[str, Any]:
        frame = await self.next()
        assert {"operation": operation, **members}.items() <= frame.items(), frame
        return frame

    async def ended(self, seconds: float = DEADLINE_SECONDS) -> None:
        """Read until the stream ends. Raise an error if the stream is cut off."""
        with suppress(StopAsyncIteration):
            while True:
                await self.next(seconds)


@asynccontextmanager
async def stream(client: httpx.AsyncClient, query: str = "", **headers: str) -> AsyncIterator[Stream]:
    """Open a stream and read its welcome, which contains the stream's position."""
    async with client.stream("GET", f"/events{query}", headers={**STREAM, **headers}) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        found = Stream(response, response.aiter_lines())
        welcome = await found.expect("welcome")
        assert found.last_id == f"{welcome['data']['epoch']}:{welcome['data']['seq']}"
        assert response.headers["stream-position"] == found.last_id
        yield found


async def page(client: httpx.AsyncClient, query: str = "") -> dict[str, Any]:
    answer = await client.get(f"/events{query}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert answer.headers["stream-position"] == f"{found['epoch']}:{found['seq']}"
    for frame in found["data"]:
        check_frame(frame)
    return found


async def pages(client: httpx.AsyncClient, path: str) -> AsyncIterator[tuple[dict[str, Any], int]]:
    """Follow the `Link` headers through all pages. Yield each page with its size in bytes."""
    while True:
        answer = await client.get(path)
        assert answer.status_code == 200, answer.text
        yield answer.json(), len(answer.content)
        if "next" not in answer.links:
            return
        path = answer.links["next"]["url"]


async def position(client: httpx.AsyncClient) -> Head:
    found = parse_position((await client.get("/movies?limit=0")).headers["stream-position"])
    assert found is not None
    return found


async def write_a_bit_of_everything(alice: Person) -> int:
    """Write events of every kind and of many sizes. Return the sequence number of the last one."""
    movie = await alice.add(title="The Third Man")
    await alice.add("characters", name="Harry Lime", movie_id=movie["id"])
    added = await alice.add_bulk([{"title": f"movie {n}"} for n in range(30)])
    await alice.http.patch("/movies/bulk", json=[{"id": each["id"], "rating": 70} for each in added[:20]])
    await alice.delete_bulk([each["id"] for each in added[10:]])
    await alice.generated("movies", 5_000)
    await alice.generated("characters", 300, "?batch_size=7")
    await alice.http.delete(f"/movies/{movie['id']}")
    return (await position(alice.http)).seq


# --- pages


async def test_the_pages_of_the_whole_log_hold_the_frames_of_the_websocket(new_service: Callable[..., Service]) -> None:
    with new_service().running() as service:
        async with service.person() as alice:
            last = await write_a_bit_of_everything(alice)
            async with service.watch(f"since={await service.position(0)}") as watcher:
                await watcher.until_seq(last)
            for query in ("", "?limit=1000", "?limit=3"):
                found = [each async for each in pages(alice.http, f"/events{query}")]
                assert [frame for each, _ in found for frame in each["data"]] == watcher.events
                assert found[-1][0]["seq"] == last
                assert all(len(each["data"]) <= int(query[7:] or 100) for each, _ in found)
                assert all(size < PAGE_BYTES + 256 or len(each["data"]) == 1 for each, size in found)
            async with service.watch(f"since={await service.position(0)}&topics=characters&bulk=summary") as watcher:
                await watcher.until(lambda frame: frame["operation"] == "add_bulk" and watcher.events[-1]["seq"] > 0)
                summaries = [
                    frame
                    async for each, _ in pages(alice.http, "/events?topics=characters&bulk=summary&limit=4")
                    for frame in each["data"]
                ]
                await watcher.until_seq(summaries[-1]["seq"])
                assert summaries == watcher.events
            assert await page(alice.http, f"?after={await service.position(last)}") == {
                "epoch": found[0][0]["epoch"],
                "seq": last,
                "data": [],
            }


@SQLITE_ONLY
async def test_a_page_for_a_quiet_topic_ends_early_and_links_to_the_next(new_service: Callable[..., Service]) -> None:
    with new_service(LOG_LEVEL="warning").running() as service:
        async with service.person() as alice:
            await alice.generated("movies", 24_000)
            character = await alice.add("characters")
            found = [each async for each, _ in pages(alice.http, "/events?topics=characters")]
            assert len(found) > 1
            assert found[0]["data"] == []
            assert [frame["data"] for each in found for frame in each["data"]] == [character]


async def test_a_page_requested_after_a_write_holds_its_event(service: Service) -> None:
    async with service.person() as alice:
        head = await position(alice.http)
        for number in range(5):
            movie = await alice.add(title=f"movie {number}")
            found = await page(alice.http, f"?after={head.seq + number}&epoch={head.epoch}&topics=movies")
            assert [frame["data"] for frame in found["data"]] == [movie]
            assert found["seq"] == head.seq + number + 1


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("after=0&epoch=elsewhere", "another epoch"),
        ("epoch=elsewhere", "another epoch"),
        ("after=elsewhere:0", "another epoch"),
        ("lastEventId=elsewhere:0", "another epoch"),
        ("lastEventId=41", "another epoch"),
        ("after={epoch}:9223372036854775807", "position is newer than the log"),
        ("after=9223372036854775807&epoch={epoch}", "position is newer than the log"),
    ],
)
async def test_an_invalid_position_gets_a_resync(service: Service, query: str, reason: str) -> None:
    query = query.format(epoch=(await service.position(0)).partition(":")[0])
    async with service.person() as alice, service.anyone() as anonymous:
        found = await page(anonymous, f"?{query}")
        (frame,) = found["data"]
        assert frame == {
            "operation": "resync",
            "topic": None,
            "data": {"reason": reason, "epoch": found["epoch"], "seq": found["seq"]},
        }
        async with stream(anonymous, f"?{query}") as sent:
            frame = await sent.expect("resync", topic=None)
            assert frame["data"]["reason"] == reason
            assert sent.last_id == f"{frame['data']['epoch']}:{frame['data']['seq']}"
            await sent.expect("add", data=await alice.add())


async def test_a_position_older_than_the_log_gets_a_resync(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.person() as alice:
        for _ in range(5):
            await alice.add()
    service.kill()  # the process still has the newest events in memory
    pruned = await prune(service, keep_rows=2)
    assert pruned
    service.start()
    async with service.anyone() as anonymous, service.watch(f"since={await service.position(1)}") as watcher:
        resync = await watcher.next()
        assert resync["operation"] == "resync"
        assert (resync["data"]["reason"], resync["data"]["seq"]) == ("position is older than the log", pruned + 2)
        after = f"?after={await service.position(1)}"
        assert (await page(anonymous, after))["data"] == [resync]
        async with stream(anonymous, after) as sent:
            assert await sent.next() == resync
        first = await page(anonymous)
        assert [frame["seq"] for frame in first["data"]] == [pruned + 1, pruned + 2]
        async with service.watch(f"since={await service.position(pruned)}") as late:
            await late.until_seq(pruned + 2)
            assert late.seqs == [pruned + 1, pruned + 2]


INVALID_QUERIES = (
    *("after=-1", "after=1.5", "after=1&after=2", "limit=0", "limit=1001", "since=1", "epoch=" + "e" * 65),
    *("topics=", "topics=movies,movies", "topics=plays", "bulk=some", "after=x:y", "after=:1"),
)


@SQLITE_ONLY
async def test_an_invalid_query_is_a_422_for_pages_and_streams(service: Service) -> None:
    async with service.anyone() as anonymous:
        for query in INVALID_QUERIES:
            for headers in ({}, STREAM):
                answer = await anonymous.get(f"/events?{query}", headers=headers)
                assert answer.status_code == 422, query
                assert answer.json()["detail"][0]["loc"][0] == "query"


# --- streams


async def test_a_stream_begins_now_and_tells_clients_how_to_resume(service: Service) -> None:
    async with service.person() as alice, service.anyone() as anonymous, stream(anonymous) as sent:
        assert sent.retry is not None
        assert 1_000 <= sent.retry <= 3_000
        assert sent.response.headers["cache-control"] == "no-store"
        assert sent.response.headers["x-accel-buffering"] == "no"
        assert sent.response.headers["x-request-id"]
        start = parse_position(sent.last_id)
        assert start is not None
        movie = await alice.add()
        added = await sent.expect("add", topic="movies", data=movie, seq=start.seq + 1)
        assert sent.last_id == f"{start.epoch}:{added['seq']}"
        await alice.http.delete(f"/movies/{movie['id']}")
        await sent.expect("delete", seq=start.seq + 2)


async def test_a_stream_that_is_often_cut_under_load_delivers_every_event_once(service: Service) -> None:
    writes, dice = 240, random.Random(7)
    async with service.person() as alice, service.anyone() as anonymous, service.watch("topics=movies") as watcher:

        async def writer(number: int) -> None:
            for index in range(writes // 8):
                await alice.add(title=f"writer {number}, movie {index}", description="x" * dice.choice((1, 9_000)))

        async def reader() -> list[dict[str, Any]]:
            seen: list[dict[str, Any]] = []
            last_id = f"{watcher.welcome['data']['epoch']}:{watcher.welcome['data']['seq']}"
            cuts = 0
            while len(seen) < writes:
                until = min(writes, len(seen) + dice.randint(1, 40))
                # The query stays the same, as when a browser reconnects.
                async with stream(anonymous, "?topics=movies&after=elsewhere:0", **{"Last-Event-ID": last_id}) as sent:
                    while len(seen) < until:
                        seen.append(await sent.next())
                    last_id = sent.last_id
                cuts += 1
            assert cuts > 5
            return seen

        _, seen = await asyncio.gather(asyncio.gather(*map(writer, range(8))), reader())
        await watcher.until_seq(seen[-1]["seq"])
        assert seen == watcher.events
        assert len({frame["data"]["id"] for frame in seen}) == writes


@pytest.mark.parametrize("last_id", ["nonsense", "1", ":", "elsewhere:1", "elsewhere:99999999999999999999", "é:1"])
@SQLITE_ONLY
async def test_an_unknown_last_id_gets_a_resync_and_new_events(service: Service, last_id: str) -> None:
    async with service.person() as alice, service.anyone() as anonymous:
        headers = [*STREAM.items(), ("Last-Event-ID", last_id.encode())]
        async with anonymous.stream("GET", "/events", headers=headers) as response:  # type: ignore[arg-type]
            sent = Stream(response, response.aiter_lines())
            await sent.expect("welcome")
            resync = await sent.expect("resync")
            assert resync["data"]["reason"] == "another epoch"
            await sent.expect("add", data=await alice.add(), seq=resync["data"]["seq"] + 1)


async def test_a_stream_takes_its_position_from_the_query_and_the_header_wins(service: Service) -> None:
    async with service.person() as alice, service.anyone() as anonymous:
        start = await position(alice.http)
        first, second = await alice.add(), await alice.add()
        here, later = f"{start.epoch}:{start.seq}", f"{start.epoch}:{start.seq + 1}"
        async with stream(anonymous, f"?lastEventId={here}&after={later}") as sent:
            await sent.expect("add", data=first)
        async with stream(anonymous, f"?lastEventId={here}", **{"Last-Event-ID": later}) as sent:
            await sent.expect("add", data=second)
        found = [each async for each, _ in pages(anonymous, f"/events?lastEventId={here}&limit=1")]
        assert [frame["data"] for each in found for frame in each["data"]] == [first, second]


@SQLITE_ONLY
async def test_blanks_around_the_id_in_the_header_do_not_matter(service: Service) -> None:
    async with service.person() as alice:
        start = await position(alice.http)
        movie = await alice.add()
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(b"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream \t\r\n")
        writer.write(f"Last-Event-ID: \t{start.epoch}:{start.seq} \t\r\n\r\n".encode())
        async with asyncio.timeout(DEADLINE_SECONDS):
            text = await reader.readuntil(f'"data":{{"id":{movie["id"]},'.encode())
        assert b"resync" not in text
        writer.close()


@SQLITE_ONLY
async def test_a_number_without_its_epoch_is_refused_with_what_to_send(service: Service) -> None:
    async with service.person() as alice, service.anyone() as anonymous:
        here = await position(alice.http)
        for headers in ({}, STREAM):
            answer = await anonymous.get(f"/events?after={here.seq}", headers=headers)
            assert answer.status_code == 409
            [problem] = answer.json()["detail"]
            assert (problem["loc"], problem["type"]) == (["query", "after"], "missing_epoch")
            assert "after=<epoch>:<seq> or after=<seq>&epoch=<epoch>" in problem["msg"]
        assert (await page(anonymous, f"?after={here.seq}&epoch={here.epoch}"))["data"] == []


async def test_a_large_bulk_write_arrives_in_several_events(service: Service) -> None:
    async with (
        service.person() as alice,
        service.anyone() as anonymous,
        stream(anonymous, "?topics=characters") as sent,
    ):
        rows = [{"name": f"character {number}", "description": "word " * 400} for number in range(1_000)]
        added = await alice.add_bulk(rows, "characters")
        seen: list[Any] = []
        while len(seen) < len(added):
            seen += (await sent.expect("add_bulk"))["data"]["items"]
        assert seen == added
        assert len(sent.events) > 1


@SQLITE_ONLY
async def test_head_returns_headers_only(service: Service) -> None:
    async with service.anyone() as anonymous:
        for headers, media_type in (({}, "application/json"), (STREAM, "text/event-stream; charset=utf-8")):
            answer = await anonymous.head("/events", headers=headers)
            assert (answer.status_code, answer.headers["content-type"]) == (200, media_type)
            assert parse_position(answer.headers["stream-position"])
            assert answer.content == b""


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", False), ("*/*", False), ("text/*", False), ("application/json", False),
        ("text/event-stream", True), ("Text/Event-Stream; charset=utf-8", True), ("text/event-stream;q=0", False),
        ("text/event-stream, */*;q=0.1", True), ("text/event-stream;q=0.5, */*", False),
        ("text/event-stream, application/json;q=0.9", True), ("text/event-stream, application/json", True),
        ("text/event-stream;q=0.5, application/json", False), ("text/event-stream;q=much, */*;q=0.1", False),
        ("text/event-stream;q=0.5, application/*;q=0.4, */*", True),
    ],
)  # fmt: skip
def test_a_stream_is_sent_only_to_clients_that_prefer_it(accept: str, expected: bool) -> None:
    assert prefers(accept, EVENT_STREAM) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abc:0", Head("abc", 0)), ("abc:9223372036854775807", Head("abc", 2**63 - 1)),
        ("abc:9223372036854775808", Head("abc", 2**63)),
        ("abc:" + "9" * 20, None), ("abc:-1", None), ("abc: 1", None), ("abc:1:2", None), (":1", None),
        ("abc:١", None), ("e" * 65 + ":1", None),
    ],
)  # fmt: skip
def test_a_position_is_an_epoch_and_a_sequence_number(text: str, expected: Head | None) -> None:
    assert parse_position(text) == expected


# --- audiences


async def emit(service: Service, audience: str, movie: dict[str, Any]) -> None:
    """Write an event for one audience, directly to the service's database."""

    async def work(tx: Transaction) -> None:
        tx.emit("movies", "update", movie, actor_id=None, before=movie, changed=["title"], audience=audience)

    async with database_of(service) as database:
        await database.write(work)


async def test_an_event_is_sent_to_its_audience_only(service: Service) -> None:
    async with service.person() as alice, service.person() as bob, service.anyone() as anonymous:
        movie = await alice.add()
        start = (await alice.http.get("/movies/count")).headers["stream-position"]
        after = f"?after={start.rpartition(':')[2]}&epoch={start.rpartition(':')[0]}"
        async with stream(alice.http) as to_alice, stream(bob.http) as to_bob, stream(anonymous) as to_anonymous:
            await emit(service, f"user:{alice.id}", movie | {"title": "for alice"})
            await emit(service, "group:admin", movie | {"title": "for admins"})
            await emit(service, f"user:{bob.id}", movie | {"title": "for bob"})
            await emit(service, "public", movie | {"title": "for all"})
            for client, sent, titles in (
                (alice.http, to_alice, ["for alice", "for all"]),
                (bob.http, to_bob, ["for bob", "for all"]),
                (anonymous, to_anonymous, ["for all"]),
            ):
                for title in titles:
                    assert (await sent.expect("update"))["data"]["title"] == title
                resumed = await page(client, after)
                assert [frame["data"]["title"] for frame in resumed["data"]] == titles
                async with stream(client, **{"Last-Event-ID": start}) as again:
                    for title in titles:
                        assert (await again.expect("update"))["data"]["title"] == title


async def test_restricted_topics_are_refused_without_the_right_to_see_them(service: Service) -> None:
    async with service.person() as alice, service.anyone() as anonymous, service.admin() as chief:
        for topics, clients in (
            ("users", (alice.http, anonymous)),
            ("sessions", (anonymous,)),
            ("movies,users", (anonymous,)),
        ):
            for client in clients:
                for headers in ({}, STREAM):
                    answer = await client.get(f"/events?topics={topics}", headers=headers)
                    assert answer.status_code == 403, (topics, answer.text)
        async with stream(chief.http, "?topics=users") as sent:
            async with service.person() as carol:
                assert (await sent.expect("add", topic="users"))["data"]["id"] == carol.id
        async with stream(alice.http, "?topics=sessions") as sent:
            async with service.anyone() as elsewhere:
                again = await service._signed_in(elsewhere, alice.name, PASSWORD)
                assert (await sent.expect("add", topic="sessions"))["data"]["user_id"] == again.id
        for headers in ({}, STREAM):
            answer = await anonymous.get("/events", headers={**headers, "Authorization": "Bearer nonsense"})
            assert answer.status_code == 401


@SQLITE_ONLY
async def test_a_stream_ends_when_its_token_expires(service: Service) -> None:
    async with service.person() as alice:
        alice.http.headers["Authorization"] = f"Bearer {alice.forged(exp=int(time.time()) + 2)}"
        started = time.monotonic()
        async with stream(alice.http) as sent:
            await sent.ended(seconds=10)
        assert 0.5 < time.monotonic() - started < 8


async def test_a_stream_ends_with_its_session_and_sends_nothing_after_it(service: Service) -> None:
    async with service.person() as alice, service.person() as bob, stream(alice.http) as sent:
        await bob.add(title="before")
        assert (await sent.expect("add"))["data"]["title"] == "before"
        assert (await alice.http.post("/auth/logout")).status_code == 204
        await bob.add(title="after")
        await sent.ended(seconds=5)
        assert [event["data"]["title"] for event in sent.events] == ["before"]


async def test_a_stream_ends_when_its_user_loses_the_right_to_its_topics(service: Service) -> None:
    async with service.admin() as chief, service.person() as alice:
        change = f"/admin/users/{alice.id}/change-group"
        assert (await chief.http.post(change, json={"group": "admin"})).status_code == 200
        async with stream(alice.http, "?topics=users") as sent, stream(alice.http, "?topics=movies") as other:
            assert (await chief.http.post(change, json={"group": "user"})).status_code == 200
            await sent.ended(seconds=5)
            await other.expect("add", data=await alice.add())


@SQLITE_ONLY
async def test_a_websocket_reads_pages_but_no_streams(service: Service) -> None:
    async with service.person() as alice, service.watch(**signed_in(alice)) as watcher:
        await alice.add()
        reply = await request(watcher, "GET", "/events?limit=1")
        assert reply["status"] == 200
        assert len(reply["body"]["data"]) == 1
        reply = await request(watcher, "GET", "/events?limit=1", headers=STREAM)
        assert reply["status"] == 406
        assert "subscribe" in reply["body"]["detail"]


# --- failures


async def test_streams_survive_the_database_and_positions_are_checked_once_it_is_back(
    own_postgres: PostgresServer, tmp_path: Path
) -> None:
    with Service(own_postgres.create_database(), "memory://", tmp_path).running() as service:
        async with service.person() as alice, service.anyone() as anonymous, AsyncExitStack() as stack:
            await alice.add()
            old = await stack.enter_async_context(stream(anonymous))
            here = await position(anonymous)
            with own_postgres.down():
                assert (await anonymous.get("/movies")).status_code == 503
                ids = (f"{here.epoch}:{here.seq + 3}", f"{here.epoch}:{here.seq}")
                never, known = [
                    await stack.enter_async_context(stream(anonymous, **{"Last-Event-ID": last_id})) for last_id in ids
                ]
            resync = await never.expect("resync")
            expected = {"reason": "position is newer than the log", "epoch": here.epoch, "seq": here.seq}
            assert resync["data"] == expected
            await eventually(lambda: is_up(anonymous), "the database is back")
            movie = await alice.add()
            for sent in (old, never, known):
                await sent.expect("add", data=movie, seq=here.seq + 1)


async def is_up(client: httpx.AsyncClient) -> bool:
    return (await client.get("/movies?limit=0")).status_code == 200
