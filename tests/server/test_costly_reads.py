"""Costly reads do not delay other reads, have a deadline, and end when their client disconnects."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest

from repository.engine.database import Database
from repository.engine.engines import READERS, Lane
from schemas import MAX_SEARCHED_WORDS
from tests.conftest import Places
from tests.support.backends import SQLITE_ONLY
from tests.support.metrics import metric
from tests.support.raw_http import raw_connection
from tests.support.requests import assert_problem, ok
from tests.support.service import ADMIN, Service, eventually

ROWS = 40_000
CLIENTS = 12
PROMPT_SECONDS = 5.0  # enough on a busy machine; a read that had to wait for costly lists would take 30 s
# Each of the 190 conditions searches the twenty genres of every row, and all conditions are true.
COSTLY = "/movies?" + "&".join(f"genre[ne]={number}" for number in range(190))
FILL = {
    True: "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows})"
    " INSERT INTO movies (title, languages, genres, characters_count, version, created_at, updated_at)"
    " SELECT 'Movie ' || i, '[]', '{genres}', 0, 1, '2026-01-01T00:00:00Z', '2026-01-01T00:00:00Z' FROM n",
    False: "INSERT INTO movies (title, languages, genres, characters_count, version, created_at, updated_at)"
    " SELECT 'Movie ' || i, '[]', '{genres}', 0, 1, now(), now() FROM generate_series(1, {rows}) i",
}
# Each page searches the whole table for values that no movie has.
COSTLY_FILTER = {"or": [{"genre": {"in": [f"{group} {number}" for number in range(100)]}} for group in range(20)]}
OTHER_CLIENT = {"X-Forwarded-For": "203.0.113.7"}
GENRES = "[" + ", ".join(f'"Genre {number}"' for number in range(20)) + "]"


async def fill(service: Service, rows: int = ROWS) -> None:
    database = Database(service.database_url)
    try:
        async with database.begin() as (connection, transaction):
            await connection.exec_driver_sql(FILL[database.is_sqlite].format(rows=rows, genres=GENRES))
            await transaction.commit()
    finally:
        await database.close()


@pytest.fixture(scope="module")
def filled(new_places: Callable[[], Places], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with many movies and with limits per client, whose deadline for reads these tests do not reach."""
    places, folder = new_places(), tmp_path_factory.mktemp("filled")
    settings = {"READ_TIMEOUT_SECONDS": "60", "RATE_LIMITS": "on", "TRUSTED_PROXIES": "127.0.0.1"}
    with Service(places.database_url, places.broadcast_url, folder, **settings).running() as service:
        asyncio.run(fill(service))
        yield service


@asynccontextmanager
async def costly_lists(service: Service, *, sending_ahead: bool = False) -> AsyncIterator[None]:
    """Let several clients wait for a costly list, and disconnect them at the end of the block.

    With `sending_ahead`, each client has sent another request after the one for the list.
    """
    request = costly_list_and_more if sending_ahead else costly_list
    lists = [asyncio.create_task(request(service)) for _ in range(CLIENTS)]
    try:
        async with service.anyone() as reader:
            await eventually(lambda: is_lane_full(reader), "the lane of costly reads is full")
        yield
        assert not all(each.done() for each in lists), "the lane was not full until the end"
    finally:
        for each in lists:
            each.cancel()
        await asyncio.gather(*lists, return_exceptions=True)


async def costly_list(service: Service) -> None:
    async with service.anyone() as client:
        await client.get(COSTLY)


async def costly_list_and_more(service: Service) -> None:
    text = "".join(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" for path in (COSTLY, "/healthz"))
    async with raw_connection(service, text) as connection:
        await connection.answer(60)


async def is_lane_full(reader: httpx.AsyncClient) -> bool:
    try:
        await reader.get("/movies/count", timeout=0.5)
    except httpx.ReadTimeout:
        return True
    return False


async def seconds_of(request: Awaitable[httpx.Response]) -> float:
    started = time.monotonic()
    await ok(request)
    return time.monotonic() - started


@pytest.mark.alone
async def test_costly_lists_delay_neither_other_lists_nor_sign_in(filled: Service) -> None:
    async with costly_lists(filled), filled.anyone() as reader:
        login = {"username": ADMIN[0], "password": ADMIN[1]}
        assert await seconds_of(reader.post("/auth/login", json=login)) < PROMPT_SECONDS
        assert await seconds_of(reader.get("/movies")) < PROMPT_SECONDS
        assert await seconds_of(reader.get("/movies?sort=-title&rating[ne]=1")) < PROMPT_SECONDS


@pytest.mark.alone
async def test_costly_lists_do_not_delay_costly_reads_of_another_client(filled: Service) -> None:
    async with costly_lists(filled), filled.anyone(OTHER_CLIENT) as reader:
        assert await seconds_of(reader.get("/movies/count")) < PROMPT_SECONDS


@pytest.mark.alone
async def test_costly_snapshots_delay_neither_light_ones_nor_reads_of_another_client(filled: Service) -> None:
    async with filled.watch() as costly, filled.watch() as same, filled.anyone() as reader:
        for number in range(31):
            wanted = {"topics": ["movies"], "snapshot": True, "filter": COSTLY_FILTER, "as": f"costly{number}"}
            await costly.send({"id": number, "action": "subscribe", **wanted})
        await eventually(lambda: is_lane_full(reader), "the client's share of costly reads is in use")
        async with filled.watch(additional_headers=OTHER_CLIENT) as other, filled.anyone(OTHER_CLIENT) as other_reader:
            for each in (same, other):
                async with asyncio.timeout(PROMPT_SECONDS):
                    await each.send({"id": 1, "action": "subscribe", "topics": ["genres"], "snapshot": True})
                    while (await each.next()).get("operation") != "snapshot":
                        pass
            assert await seconds_of(other_reader.get("/movies/count")) < PROMPT_SECONDS
        assert await is_lane_full(reader), "the snapshots ended too early to be costly"


@pytest.mark.alone
@pytest.mark.parametrize("sending_ahead", [False, True])
async def test_a_read_ends_when_its_client_disconnects(filled: Service, sending_ahead: bool) -> None:
    async with costly_lists(filled, sending_ahead=sending_ahead):
        pass
    async with filled.anyone() as reader:
        assert await seconds_of(reader.get("/movies/count")) < PROMPT_SECONDS, "statements outlive their clients"
    assert "unexpected error" not in filled.log()


@pytest.mark.alone
async def test_a_read_over_a_socket_ends_when_the_socket_does(filled: Service) -> None:
    async with filled.anyone() as reader:
        async with filled.watch() as watcher:
            for number in range(READERS[Lane.COSTLY] + 1):
                await watcher.send({"id": number, "action": "request", "method": "GET", "path": COSTLY})
            await eventually(lambda: is_lane_full(reader), "the lane of costly reads is full")
        assert await seconds_of(reader.get("/movies/count")) < PROMPT_SECONDS, "statements outlive their clients"


async def test_a_read_past_its_deadline_is_a_503(new_service: Callable[..., Service]) -> None:
    service = new_service(READ_TIMEOUT_SECONDS="1").start()
    await fill(service, 4 * ROWS)  # with so many rows, a costly read takes several seconds on any machine
    async with service.anyone() as reader:
        refused = await reader.get(COSTLY)
        assert_problem(refused, 503)
        assert refused.json()["detail"].startswith("The read took longer than 1 s and was stopped")
        assert refused.headers["Retry-After"] == "1"
        await ok(reader.get("/movies?limit=1"))
        assert await metric(service, "marquee_read_timeouts_total", lane="costly") == 1


@SQLITE_ONLY
@pytest.mark.parametrize("path", ["/movies", "/movies/count", "/movies/names", "/characters", "/users"])
async def test_a_search_has_at_most_eight_different_words(service: Service, path: str) -> None:
    words = [f"word{number}" for number in range(MAX_SEARCHED_WORDS + 1)]
    async with service.person() as reader:
        refused = await reader.http.get(path, params={"q": " ".join(words)})
        assert_problem(refused, 422, ["query", "q"])
        assert "Expected at most 8 different words, got 9" in refused.text
        await ok(reader.http.get(path, params={"q": " ".join(words[:-1] * 2)}))


async def test_a_search_finds_each_word_in_any_searched_field(service: Service) -> None:
    async with service.person() as alice:
        mark = f"mark{alice.id}"
        movie = await alice.add(title=f"Über 100% {mark}", description="Harry_Lime\nΌΣ \\ end")
        found = ("{} ÜBER", "lime {} lime", "100% {}", "harry_lime {}", "όσ {}", "\\ {}")
        for text in (each.format(mark) for each in found):
            assert await ok(alice.http.get("/movies", params={"q": text})) == [movie], text
        for text in (f"{mark} absent", f"10_0 {mark}", f"arry {mark}", f"{mark}harry"):
            assert await ok(alice.http.get("/movies", params={"q": text})) == [], text
        bare = await alice.add(title=f"{mark} bare")
        assert await ok(alice.http.get("/movies", params={"q": f"bare {mark}"})) == [bare]
