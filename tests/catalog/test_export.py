"""Exports: whole lists as CSV and NDJSON, as of one moment, in constant memory, within bounds."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from sqlalchemy import insert, update

import models
from core.errors import Unavailable
from core.times import utc_now
from repository.engine.database import Database
from repository.generic import lists, writes
from repository.generic.lists import ListRequest
from repository.transfers import exports
from repository.transfers.lines import FileOptions, Format
from resources.comments import COMMENTS
from resources.genres import GENRES
from resources.movies import MOVIES
from resources.resource import Resource
from services.transfers import formats
from services.transfers.in_progress import MAX_EXPORTS
from tests.support.backends import SQLITE_ONLY
from tests.support.raw_http import raw_connection
from tests.support.requests import assert_problem, over_socket
from tests.support.resources import moderator, sql
from tests.support.service import Service, eventually

FULL: dict[str, Any] = {
    "title": 'Say "hi", then\r\nleave',
    "description": "=1+1, \u00e9\U0001f3ac",
    "release_date": "1949-09-01",
    "rating": 93,
    "genres": ["Noir", "a,b"],
    "languages": ["German"],
}


CSV = FileOptions(Format.CSV)


def records(answer: httpx.Response) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(answer.content.decode(), newline=""), strict=True))


def objects(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answer.text.splitlines()]


async def test_an_export_is_the_list_as_a_file(service: Service) -> None:
    service.add_genres(*FULL["genres"])
    async with service.person() as alice:
        await alice.add_bulk([FULL, {"title": "-2"}, {"title": "+3", "description": "'=x"}])
        mine = f"user_id={alice.id}"
        listed = await alice.http.get(f"/movies?{mine}")

        answer = await alice.http.get(f"/movies/export?{mine}")
        assert objects(answer) == listed.json()
        assert answer.headers["Content-Type"] == "application/x-ndjson"
        assert answer.headers["Content-Disposition"] == 'attachment; filename="movies.ndjson"'
        assert answer.headers["Stream-Position"] == listed.headers["Stream-Position"]
        assert "Accept" in answer.headers["Vary"]

        answer = await alice.http.get(
            f"/movies/export?{mine}", headers={"Accept": "text/csv, application/x-ndjson;q=0.5"}
        )
        assert answer.headers["Content-Type"] == "text/csv; charset=utf-8; header=present"
        assert answer.headers["Content-Disposition"] == 'attachment; filename="movies.csv"'
        head = ",".join(listed.json()[0])
        assert answer.content.startswith(f"{head}\r\n".encode())
        assert answer.content.count(b"\r\n") == 4 + FULL["title"].count("\r\n")
        first, second, _ = records(answer)
        assert (first["title"], first["description"], first["rating"]) == (FULL["title"], FULL["description"], "93")
        assert json.loads(first["genres"]) == FULL["genres"]
        assert (second["description"], second["genres"], second["title"]) == ("", "[]", "-2")
        assert first["created_at"] == listed.json()[0]["created_at"]

        answer = await alice.http.get(
            f"/movies/export?{mine}&format=csv&safe=true&bom=true&fields=id,title,description"
        )
        assert answer.content.startswith(b"\xef\xbb\xbfid,title,description\r\n")
        _, one, two, three = csv.reader(io.StringIO(answer.content.decode("utf-8-sig"), newline=""))
        assert [one[2], two[1], three[1], three[2]] == [f"'{FULL['description']}", "'-2", "'+3", "''=x"]


async def test_an_export_takes_the_filters_the_search_and_the_order_of_the_list(service: Service) -> None:
    async with service.person() as alice:
        rows = [{"title": f"Vienna {n}", "rating": n % 3 + 1, "genres": ["Noir"] if n % 2 else []} for n in range(9)]
        await alice.add_bulk([*rows, {"title": "Berlin"}])
        query = f"user_id={alice.id}&q=vienna&genre=Noir&rating[in]=1,2,3&sort=-rating,title&fields=title,rating"
        expected = (await alice.http.get(f"/movies?{query}")).json()
        assert len(expected) == 4
        assert objects(await alice.http.get(f"/movies/export?{query}")) == expected
        await alice.add_bulk([{"title": "The café of Vienna", "release_date": "1949-09-01"}, {"title": "Vienna"}])
        ranked = f"user_id={alice.id}&q=vienna&fields=title,release_date,genres,created_at"
        expected = (await alice.http.get(f"/movies?{ranked}")).json()
        assert [expected[place]["title"] for place in (0, 1, -1)] == ["Vienna", "Vienna 0", "The café of Vienna"]
        assert objects(await alice.http.get(f"/movies/export?{ranked}")) == expected
        for name in ("characters", "genres", "actors"):
            assert objects(await alice.http.get(f"/{name}/export?id=0")) == []
            answer = await alice.http.get(f"/{name}/export?id=0&format=csv&fields=id,name")
            assert answer.content == b"id,name\r\n"
        for accept in ("text/*", "text/csv, */*;q=0.9"):
            answer = await alice.http.get("/genres/export?id=0", headers={"Accept": accept})
            assert answer.headers["Content-Type"].startswith("text/csv"), accept
        head = await alice.http.head("/movies/export?format=csv")
        assert (head.content, "Stream-Position" in head.headers) == (b"", True)
        packed = await alice.http.get(f"/movies/export?user_id={alice.id}", headers={"Accept-Encoding": "gzip"})
        assert packed.headers["Content-Encoding"] == "gzip"
        assert len(objects(packed)) == 12
        async with moderator(service) as staff:
            await staff.add("genres", name=f"genre of {staff.name}", description=None)
            found = records(await alice.http.get(f"/genres/export?format=csv&name=genre of {staff.name}"))
            assert [row["description"] for row in found] == [""]


@SQLITE_ONLY
async def test_invalid_exports_are_rejected(service: Service) -> None:
    async with service.person() as alice:
        for query, name in (
            ("format=xml", "format"),
            ("bom=1", "bom"),
            ("limit=3", "limit"),
            ("sort=nothing", "sort"),
            ("fields=titel", "fields"),
            ("raiting=3", "raiting"),
        ):
            assert_problem(await alice.http.get(f"/movies/export?{query}"), 422, ["query", name])
        async with service.watch() as watcher:
            assert (await over_socket(watcher, "GET", "/movies/export"))["status"] == 406


async def add(database: Database, number: int) -> None:
    rows = [{"title": f"movie {n}"} for n in range(number)]
    await database.write(lambda tx: writes.store(tx, MOVIES, rows, None))


async def test_all_rows_of_an_export_are_as_of_one_moment(database: Database) -> None:
    await add(database, 2_500)
    async with exports.opened(database, MOVIES, ListRequest(columns=("id", "title")), CSV) as export:
        seen = list(await anext(export.batches))
        await add(database, 1_000)
        async for batch in export.batches:
            seen += batch
    assert seen == [f"{n + 1},movie {n}" for n in range(2_500)]
    assert export.head.seq == 3, "2,500 rows are three events"
    async with exports.opened(database, MOVIES, ListRequest(), CSV) as export:
        assert export.head.seq == 4
        assert sum([len(batch) async for batch in export.batches]) == 3_500


async def test_an_export_ends_at_its_deadline_and_when_the_log_grows(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add(database, 3_000)
    monkeypatch.setattr(exports, "EXPORT_SECONDS", 0.2)
    with pytest.raises(Unavailable, match="longer than"):
        async with exports.opened(database, MOVIES, ListRequest(), CSV):
            await asyncio.sleep(10)
    monkeypatch.setattr(exports, "EXPORT_SECONDS", 30.0)
    if database.is_sqlite:
        monkeypatch.setattr(exports, "MAX_LOG_GROWTH_BYTES", 100_000)
        with pytest.raises(Unavailable, match="Too many rows were written"):
            await _while_much_is_written(database)
        monkeypatch.setattr(exports, "MAX_LOG_BYTES", 100_000)
        with pytest.raises(Unavailable, match="must be emptied"):
            async with exports.opened(database, MOVIES, ListRequest(), CSV):
                pass
        await database.shrink_log()
    async with exports.opened(database, MOVIES, ListRequest(), CSV) as export:
        assert await anext(export.batches), "the connections can be used again"


async def _while_much_is_written(database: Database) -> None:
    """Open an export whose client takes nothing after the first batch."""
    async with exports.opened(database, MOVIES, ListRequest(), CSV) as export:
        await anext(export.batches)
        await add(database, 3_000)
        await asyncio.sleep(10)


async def test_the_exports_of_a_client_and_of_all_are_bounded(new_service: Callable[..., Service]) -> None:
    service = new_service(RATE_LIMITS="on").start()
    async with service.person() as alice, service.anyone() as anonymous:
        await alice.generated("movies", 20_000)
        before = service.memory_bytes()
        async with alice.http.stream("GET", "/movies/export") as slow:
            refused = await alice.http.get("/movies/export")
            assert refused.status_code == 429
            assert int(refused.headers["Retry-After"]) > 0
            assert (await anonymous.get("/movies/export")).status_code == 429, "it has the same address"
            assert (await anonymous.get("/movies?limit=1&sort=title")).status_code == 200
            size = sum([len(part) async for part in slow.aiter_bytes()])
        assert size > 5_000_000
        assert service.memory_bytes() - before < 40_000_000
        assert len(objects(await alice.http.get("/movies/export"))) == 20_000


async def test_an_export_whose_client_leaves_ends_its_transaction(new_service: Callable[..., Service]) -> None:
    service = new_service().start()  # without limits for clients
    async with service.person() as alice:
        await alice.generated("movies", 40_000)
        request = "GET /movies/export HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        async with AsyncExitStack() as stack:
            for _ in range(MAX_EXPORTS):
                slow = await stack.enter_async_context(raw_connection(service, request, keeps=4_096))
                assert await slow.head() == "HTTP/1.1 200 OK"
            assert (await alice.http.get("/movies/export")).status_code == 429
        await eventually(lambda: exports_end(alice.http), "the places are free again")
        if not service.database_url.startswith("sqlite"):
            activity = "pg_stat_activity WHERE datname = current_database()"
            assert await sql(service, f"SELECT state FROM {activity} AND state = 'idle in transaction'") == []


async def exports_end(client: httpx.AsyncClient) -> bool:
    return (await client.get("/movies/export?id=1")).status_code == 200


async def lines_of(database: Database, resource: Resource, columns: tuple[str, ...], options: FileOptions) -> list[str]:
    async with exports.opened(database, resource, ListRequest(columns=columns), options) as export:
        return [line async for batch in export.batches for line in batch]


async def test_a_safe_text_can_be_taken_back(database: Database) -> None:
    texts = ["plain", "=1", "'=1", "''=1", "'", "'quoted", "@x", "\tx", "-", "a=1", "\rx", '=a,"b"']
    await database.write(
        lambda tx: writes.store(tx, GENRES, [{"name": str(n), "description": text} for n, text in enumerate(texts)], 1)
    )
    lines = await lines_of(database, GENRES, ("id", "description"), FileOptions(Format.CSV, is_safe=True))
    shown = [cells[1] for cells in csv.reader(io.StringIO("\r\n".join(lines), newline=""), strict=True)]
    assert {text[:1] for text in shown} == {"p", "'", "a"}
    assert [formats.unsafe(text) for text in shown] == texts


async def test_every_type_of_a_value_has_its_form_in_both_formats(database: Database) -> None:
    text = "a\x01\t\n\"\\/'%s \u2028\U0001f3ac"
    row: dict[str, Any] = {
        "title": text,
        "description": None,
        "genres": [],
        "rating": 3,
        "release_date": "0900-01-02",
        "budget": 2**53,
    }
    await database.write(lambda tx: writes.store(tx, MOVIES, [row, {**row, "title": "b", "description": ""}], None))
    for place, average in enumerate((7.0, 8.25), 1):
        async with database.begin() as (connection, _):
            changed = update(models.movies).values(average_rating=average)
            await connection.execute(changed.where(models.movies.c.id == place))
    (listed, other) = (await lists.page_of(database, MOVIES, ListRequest())).rows
    first, second = await lines_of(database, MOVIES, MOVIES.columns, FileOptions(Format.NDJSON))
    assert (json.loads(first), json.loads(second)) == (listed, other)
    assert first == json.dumps(listed, ensure_ascii=False, separators=(",", ":")).replace("\u2028", "\u2028")
    columns = ("average_rating", "title", "release_date", "budget", "description", "genres")
    assert await lines_of(database, MOVIES, columns, CSV) == [
        '7.0,"' + text.replace('"', '""') + '",0900-01-02,9007199254740992,,[]',
        "8.25,b,0900-01-02,9007199254740992,,[]",
    ]
    assert await lines_of(database, MOVIES, ("description",), CSV) == ['""', '""'], "no empty lines"
    comment = {"text": "ab", "movie_id": 1, "depth": 0, "deleted": False, "replies_count": 0, "version": 1}
    async with database.begin() as (connection, _):
        await connection.execute(
            insert(models.comments).values(comment | dict.fromkeys(("created_at", "updated_at"), utc_now()))
        )
    shown = ("deleted", "parent_id", "text")
    assert await lines_of(database, COMMENTS, shown, CSV) == ["false,,ab"]
    expected = ['{"deleted":false,"parent_id":null,"text":"ab"}']
    assert await lines_of(database, COMMENTS, shown, FileOptions(Format.NDJSON)) == expected
