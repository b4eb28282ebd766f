"""Imports: rows of a file are stored once, by a job that can be resumed, cancelled and reported."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import time
import uuid
import zlib
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

import pytest
from starlette.requests import Request

from core.errors import MAX_MEMBERS, MAX_SUGGESTIONS, RequestTimeout, TooManyRequests
from core.identity import Group, Identity
from core.stopping import Stopping
from core.texts.suggestions import Unknown
from jobs.runner import Runner
from repository import jobs
from repository.engine import transaction
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic import writes
from repository.jobs import JobOrder, Origin
from repository.transfers import imports
from repository.transfers.imports import ImportOrder
from repository.transfers.lines import Format
from resources.jobs import Kind
from resources.movies import MOVIES
from resources.registry import RESOURCES
from resources.resource import Resource
from routes.http import uploads
from services.transfers import in_progress
from services.transfers.checking import MAX_PROBLEMS_OF_ROW, Checker, Row, columns_of
from services.transfers.formats import BOM
from services.transfers.reading import MAX_RECORD_BYTES, Record, records
from tests.support.accounts import account
from tests.support.backends import SQLITE_ONLY
from tests.support.event_logs import database_of
from tests.support.raw_http import raw_connection
from tests.support.requests import assert_problem, change_group, ok, over_socket
from tests.support.resources import moderator, sql, watching
from tests.support.service import Person, Service, eventually


def csv_of(*rows: Iterable[Any]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    return text.getvalue().encode()


def ndjson_of(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


OCTETS = "application/octet-stream"


async def start(person: Person, content: bytes, query: str = "", resource: str = "movies") -> dict[str, Any]:
    kind = "application/x-ndjson" if content.startswith(b"{") else "text/csv"
    answer = await person.http.post(f"/{resource}/import{query}", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    assert answer.headers["Location"] == f"/jobs/{job['id']}"
    return job


async def imported(
    person: Person, content: bytes, query: str = "", resource: str = "movies"
) -> tuple[dict[str, Any], list[tuple[int, str]], dict[str, Any]]:
    """Import a file. Return the ended job, the line and the field of each problem, and the counts of the report."""
    job = await person.job_ended((await start(person, content, query, resource))["id"])
    problems, counts = await report(person, job["id"])
    return job, [(problem["line"], problem["field"]) for problem in problems], counts


async def report(person: Person, job_id: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    answer = await person.http.get(f"/jobs/{job_id}/report")
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"] == "application/x-ndjson"
    *problems, counts = [json.loads(line) for line in answer.text.splitlines()]
    assert all(problem["reason"] for problem in problems)
    return problems, counts


def counts_of(added: int = 0, updated: int = 0, failed: int = 0, **more: Any) -> dict[str, Any]:
    base = {"state": "done", "error": None, "dry_run": False, "not_shown": 0}
    return {**base, "added": added, "updated": updated, "failed": failed, **more}


async def mine(person: Person, resource: str = "movies") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = await ok(person.http.get(f"/{resource}/user?limit=1000"))
    return rows


MIXED = (
    b"\xef\xbb\xbftitle,rating,genres,description\r\n"
    b'One,5,"[""Noir""]",\r\n'
    b'"Two\nlines","7",,"say ""hi"""\n'
    b"\r\n"
    b"Three,seven,,\r\n"
    b'Four,1,"broken"quotes,\r\n'
    b"Five,2,,\xff\xfe\r\n"
    b"Six,3\r\n"
    b",4,,\r\n"
    b"Eight,8,not a list,=1\r\n"
    b"Nine,9,[],last"
)


async def test_a_csv_file_is_imported_line_by_line(service: Service) -> None:
    async with service.person() as alice, watching(service, "topics=movies") as watcher:
        job, problems, counts = await imported(alice, MIXED)
        assert (job["kind"], job["state"], job["done"], job["total"]) == ("import_movies", "done", 12, 12)
        assert problems == [(6, "rating"), (7, ""), (8, ""), (9, ""), (10, "title"), (11, "genres")]
        assert counts == counts_of(added=3, failed=6)
        one, two, nine = await mine(alice)
        assert (one["title"], one["rating"], one["genres"], one["description"]) == ("One", 5, ["Noir"], None)
        assert (two["title"], two["description"]) == ("Two\nlines", 'say "hi"')
        assert (nine["title"], nine["genres"]) == ("Nine", [])
        event = await watcher.expect("add_bulk")
        assert (event["data"]["items"], event["data"]["job_id"]) == ([one, two, nine], job["id"])
        assert event["actor_id"] == alice.id


@pytest.mark.parametrize("query", ["format=ndjson", "format=csv", "format=csv&safe=true&bom=true"])
async def test_what_was_exported_can_be_imported_again(service: Service, query: str) -> None:
    texts = ["=1", "'=1", "-2", 'a "b", c', "two\r\nlines", "\u00e9\U0001f3ac", "'"]
    names = {each: [each] if "\n" not in each else [] for each in texts}
    service.add_genres(*(name for listed in names.values() for name in listed))
    async with service.person() as alice, moderator(service) as bob:
        added = await alice.add_bulk([{"title": "t", "description": each, "genres": names[each]} for each in texts])
        safe = "&safe=true" if "safe" in query else ""
        path = f"/movies/export?user_id={alice.id}&sort=id&{query}"
        whole = await alice.http.get(path)
        fields = await alice.http.get(f"{path}&fields=title,description,genres")
        for row in added:
            await alice.http.patch(f"/movies/{row['id']}", json={"description": None, "genres": []})
        kind = whole.headers["Content-Type"].partition(";")[0]
        for content, person in ((whole.content, bob), (fields.content, bob)):
            answer = await person.http.post(
                f"/movies/import?dry_run=false{safe}", content=content, headers={"Content-Type": kind}
            )
            assert (await person.job_ended(answer.json()["id"]))["state"] == "done"
        again = [(row["id"], row["description"], row["genres"], row["version"]) for row in await mine(alice)]
        assert again == [(row["id"], row["description"], row["genres"], 3) for row in added]
        assert [(row["description"], row["genres"]) for row in await mine(bob)] == list(names.items())


async def test_rows_with_an_id_change_only_what_the_user_may_change(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        first, second = await alice.add_bulk([{"title": "a", "rating": 1}, {"title": "b", "rating": 2}])
        foreign = await bob.add()
        rows = (
            ndjson_of(
                {"id": first["id"], "title": "A", "version": 9, "created_at": "ignored"},
                {"id": foreign["id"], "title": "mine now"},
                {"id": 2**40, "title": "nobody's"},
                {"id": "7", "title": "x"},
                {"title": "new", "titel": "x"},
                {"id": second["id"], "rating": None},
                {"title": "new", "rating": 3},
                {"id": first["id"], "rating": 0},
            )
            + b"[]\n{\n\xff\n"
        )
        _, problems, counts = await imported(alice, rows)
        assert problems == [(2, "id"), (3, "id"), (4, "id"), (5, "titel"), (8, "rating"), (9, ""), (10, ""), (11, "")]
        assert counts == counts_of(added=1, updated=2, failed=8)
        assert [(row["title"], row["rating"], row["version"]) for row in await mine(alice)] == [
            ("A", 1, 2),
            ("b", None, 2),
            ("new", 3, 1),
        ]
        assert [row["title"] for row in await mine(bob)] == ["The Third Man"]
        # A CSV file changes only its columns.
        await imported(alice, csv_of(["id", "rating"], [first["id"], 50], [second["id"], ""]))
        assert [(row["title"], row["rating"]) for row in await mine(alice)][:2] == [("A", 50), ("b", None)]


async def test_a_dry_run_stores_nothing_and_an_import_stops_at_a_problem(service: Service) -> None:
    rows = csv_of(["name", "movie_id"], ["x", ""], ["y", 2**40], ["z", ""], ["", ""])
    async with service.person() as alice:
        job, problems, counts = await imported(alice, rows, "?dry_run=true", "characters")
        assert (job["state"], problems) == ("done", [(3, "movie_id"), (5, "name")])
        assert counts == counts_of(added=2, failed=2, dry_run=True)
        assert await mine(alice, "characters") == []
        job, problems, counts = await imported(alice, rows, "?on_error=stop", "characters")
        assert (job["state"], job["done"], problems) == ("failed", 2, [(3, "movie_id")])
        assert job["error"] == "Stopped at line 3; the report says why", "everyone can see the job"
        assert counts == counts_of(added=1, failed=1, state="failed", error=job["error"])
        assert [row["name"] for row in await mine(alice, "characters")] == ["x"]


async def test_genres_and_actors_are_imported_by_staff_only(service: Service) -> None:
    async with service.person() as alice, service.admin() as chief:
        names = [f"genre {alice.name} {n}" for n in range(3)]
        rows = csv_of(["name"], *([name] for name in (*names, names[0].upper())))
        for resource in ("genres", "actors"):
            answer = await alice.http.post(f"/{resource}/import", content=rows, headers={"Content-Type": "text/csv"})
            assert_problem(answer, 403)
        _, problems, counts = await imported(chief, rows, "", "genres")
        assert (problems, counts) == ([(5, "name")], counts_of(added=3, failed=1))
        _, problems, counts = await imported(chief, csv_of(["name", "country"], ["A", "AT"], ["B", "XX"]), "", "actors")
        assert (problems, counts) == ([(3, "country")], counts_of(added=1, failed=1))
        entries = await ok(chief.http.get("/admin/audit?resource[in]=genres,actors&action=create&sort=-id&limit=2"))
        assert [(entry["resource"], entry["count"]) for entry in entries] == [("actors", 1), ("genres", 3)]


@SQLITE_ONLY
async def test_invalid_files_and_parameters_are_rejected(service: Service) -> None:
    async with service.person() as alice, service.anyone() as anonymous:
        for content, loc in (
            (b"", ["body"]),
            (b"titel\r\nx\r\n", ["body", "titel"]),
            (b"title,title\r\n", ["body", "title"]),
            (b"id,version\r\n1,2\r\n", ["body"]),
            (b'"title\r\nx\r\n', ["body"]),
            (b"\xff\r\n", ["body"]),
        ):
            answer = await alice.http.post("/movies/import", content=content, headers={"Content-Type": "text/csv"})
            assert_problem(answer, 422, loc)
        answer = await alice.http.post(
            "/movies/import?format=csv", content=b"titel\n", headers={"Content-Type": OCTETS}
        )
        assert "Did you mean title" in answer.text
        octets = {"Content-Type": OCTETS}
        assert_problem(await alice.http.post("/movies/import", content=b"x", headers=octets), 422, ["query", "format"])
        assert_problem(await alice.http.post("/movies/import", json=[]), 415)
        answer = await alice.http.post("/movies/import?on_error=x", content=b"x", headers=octets)
        assert_problem(answer, 422, ["query", "on_error"])
        request = (
            "POST /movies/import?format=csv HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            f"Authorization: Bearer {alice.token}\r\nContent-Type: {OCTETS}\r\n"
            f"Content-Length: {imports.MAX_FILE_BYTES + 1}\r\n\r\n"
        )
        async with raw_connection(service, request) as connection:
            assert (await connection.head()).startswith("HTTP/1.1 413 ")
        assert_problem(await anonymous.post("/movies/import", content=b"x", headers=octets), 401)
        async with service.watch() as watcher:
            assert (await over_socket(watcher, "POST", "/movies/import", {}))["status"] in (401, 415)


async def test_a_report_is_private_to_the_owner_and_admins(service: Service) -> None:
    async with service.person() as alice, moderator(service) as bob, service.admin() as chief:
        job = await start(alice, b"title\r\nx\r\n,\r\n")
        await alice.job_ended(job["id"])
        assert await report(alice, job["id"]) == await report(chief, job["id"])
        assert_problem(await bob.http.get(f"/jobs/{job['id']}/report"), 403)
        other = await alice.generated("movies", 1)
        assert_problem(await alice.http.get(f"/jobs/{other['id']}/report"), 404)
        assert_problem(await alice.http.get("/jobs/00000000-0000-0000-0000-000000000000/report"), 404)


def many(number: int, resource: str = "movies") -> bytes:
    label = "title" if resource == "movies" else "name"
    return csv_of([label, "description"], *([f"row {n}", "x" * 150] for n in range(number)))


async def test_an_import_of_a_killed_server_continues_at_the_stored_place(new_service: Callable[..., Service]) -> None:
    total = 20_000
    service = new_service().start()
    async with service.person() as alice:
        async with service.watch("topics=movies") as watcher:
            job = await start(alice, many(total))
            await watcher.expect("add_bulk")
            await asyncio.to_thread(service.kill)
        stored = (await sql(service, "SELECT count(*) FROM movies"))[0][0]
        assert 0 < stored < total
        await sql(service, "UPDATE jobs SET lease_until = 0")  # let the lease of the killed process expire
        await asyncio.to_thread(service.start)
        ended = await alice.job_ended(job["id"])
        assert (ended["state"], ended["done"]) == ("done", total + 1)
        assert (await report(alice, job["id"]))[1] == counts_of(added=total)
        assert await sql(service, "SELECT count(*), count(DISTINCT title) FROM movies") == [(total, total)]
        await eventually(lambda: _no_parts(service), "the file is deleted")


async def _no_parts(service: Service) -> bool:
    return await sql(service, "SELECT job_id FROM import_parts WHERE role = 'file'") == []


async def test_an_import_can_be_cancelled_and_its_user_can_lose_the_rights(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.person() as alice, service.admin() as chief:
        async with service.watch("topics=movies") as watcher:
            job = await start(alice, many(50_000))
            await watcher.expect("add_bulk")
            cancelled = await ok(alice.http.delete(f"/jobs/{job['id']}"))
        assert cancelled["state"] == "cancelled"
        stored = (await sql(service, "SELECT count(*) FROM movies"))[0][0]
        assert stored == cancelled["done"] - 1, "the header is a line, too"
        assert (await report(alice, job["id"]))[1]["added"] == stored
        # The file is no longer read.
        async with database_of(service) as database:
            assert await imports.discard_unused(database, datetime.now(UTC) - timedelta(hours=1)) >= 0
        assert await _no_parts(service)

        await change_group(chief, alice, "moderator")
        async with service.watch("topics=actors") as watcher:
            job = await start(alice, many(50_000, "actors").replace(b"description", b"biography", 1), "", "actors")
            await watcher.expect("add_bulk")
            await change_group(chief, alice, "user")
        ended = await alice.job_ended(job["id"])
        assert (ended["state"], ended["error"]) == ("failed", "Only moderators and admins may add actors")


async def test_imports_count_against_the_limits_of_their_user(new_service: Callable[..., Service]) -> None:
    service = new_service(RATE_LIMITS="on", GENERATED_ROWS_PER_DAY="30").start()
    headers = {"Content-Type": "text/csv"}
    async with service.person() as alice:
        assert_problem(await alice.http.post("/movies/import", content=many(40), headers=headers), 422, ["body"])
        await imported(alice, many(20))
        refused = await alice.http.post("/movies/import", content=many(20), headers=headers)
        assert refused.status_code == 429
        assert await _no_parts(service)
        # An import that no worker can finish counts as unfinished.
        await sql(service, "UPDATE jobs SET state = 'running', lease_owner = 'a frozen worker', lease_until = 1e12")
        job = await start(alice, b"title\r\nx\r\n")
        await alice.job_ended(job["id"])
        await sql(service, "UPDATE jobs SET state = 'running', lease_owner = 'a frozen worker', lease_until = 1e12")
        refused = await alice.http.post("/movies/import", content=b"title\r\nx\r\n", headers=headers)
        assert (refused.status_code, "unfinished imports" in refused.text) == (429, True)


# --- without a service


def read(content: bytes, format_: Format = Format.CSV, size: int = 2**20) -> list[Record]:
    """Return all records of a file that is read in pieces of `size` bytes, as an import does."""
    found: list[Record] = []
    place, line, is_long = 0, 1, False
    while place < len(content):
        piece = content[place : place + size]
        is_last = place + size >= len(content)
        found += records(format_, piece, line, is_last=is_last, is_in_long_line=is_long)
        last = found[-1]
        place, line, is_long = place + last.end, last.next_line, last.is_in_long_line
    return found


def test_a_file_is_read_alike_in_pieces_of_any_size() -> None:
    whole = [(each.line, each.values, each.problem) for each in read(MIXED)]
    assert [line for line, *_ in whole] == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12]
    for size in (60, 75, 100, len(MIXED)):
        in_pieces = [(each.line, each.values, each.problem) for each in read(MIXED, size=size)]
        assert in_pieces == whole


@pytest.mark.parametrize("format_", list(Format))
def test_a_line_that_is_too_long_is_one_problem(format_: Format) -> None:
    good = b'{"title":"x"}' if format_ is Format.NDJSON else b"x"
    content = good + b"\n" + b"y" * (3 * MAX_RECORD_BYTES) + b"\n" + good + b"\n"
    for size in (2 * MAX_RECORD_BYTES, 2**22):
        found = read(content, format_, size)
        assert [(each.line, each.problem is None) for each in found if each.values or each.problem] == [
            (1, True),
            (2, False),
            (3, True),
        ]


def test_an_unclosed_quote_hides_no_later_line() -> None:
    content = b'title\n"open\nnext\n' + b"row\n" * 10
    found = read(content)
    assert [(each.line, each.values) for each in found][:3] == [(1, ["title"]), (2, None), (3, ["next"])]
    assert len(found) == 13
    long = b'title\n"open\n' + b"row\n" * (MAX_RECORD_BYTES // 2)
    assert len(read(long, size=512 * 1024)) == MAX_RECORD_BYTES // 2 + 2


@pytest.mark.parametrize("end", [b"", b'"\n', b'"x\n', b"y" * (2 * MAX_RECORD_BYTES) + b"\n"])
def test_quotes_are_read_in_linear_time_and_alike_in_pieces_of_any_size(end: bytes) -> None:
    """Each of these lines opens a quote, whether the line before it is in quotes or not."""
    lines = MAX_RECORD_BYTES // 4
    content = b"title,x\n" + b'a","\n' * lines + end
    started = time.process_time()
    found = read(content)
    assert time.process_time() - started < 10, "it would take minutes to read on from each line"
    unclosed = f"Expected a closing quote within {MAX_RECORD_BYTES} bytes"
    assert [each.problem for each in found[1 : lines // 5]] == [unclosed] * (lines // 5 - 1)
    in_pieces = read(content, size=300 * 1024)
    shown = [
        [(each.line, each.values) for each in every if each.values or each.problem] for every in (found, in_pieces)
    ]
    assert shown[0] == shown[1]


def test_a_record_that_is_too_long_hides_no_later_line() -> None:
    content = b'title\n"open\n' + b"row\n" * (MAX_RECORD_BYTES // 2) + b'"\n'
    for size in (512 * 1024, 2**24):
        assert sum(each.values == ["row"] for each in read(content, size=size)) == MAX_RECORD_BYTES // 2


def test_a_file_with_nothing_but_a_byte_order_mark_has_no_rows() -> None:
    assert [(each.line, each.next_line, each.values) for each in read(BOM, Format.NDJSON)] == [(1, 2, None)]


def test_cells_become_values() -> None:
    checker = Checker(MOVIES, Format.CSV, ("id", "title", "rating", "genres", "version"), is_safe=True)
    row = checker.check(Record(2, 3, 9, ["", "'=x", "50", '["a"]', "7"]))
    assert isinstance(row, Row)
    assert (row.id, row.fields["title"], row.fields["rating"], row.fields["genres"]) == (None, "=x", 50, ["a"])
    changed = checker.check(Record(2, 3, 9, ["5", "y", "", "", "7"]))
    assert changed == Row(2, 5, {"title": "y", "rating": None, "genres": []})
    for cell in ("--5", "-", "1e1", "5.0", "\u0665", " 5", "9" * 30):
        problems = checker.check(Record(2, 3, 9, ["", "y", cell, "[]", ""]))
        assert isinstance(problems, list)
        assert [problem.field for problem in problems] == ["rating"], cell


def test_unknown_names_cost_little_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def nearest(self: Unknown) -> str | None:
        compared.append(self.name)
        return "title" if self.name == "titel0" else None

    monkeypatch.setattr(Unknown, "nearest", nearest)
    checker = Checker(MOVIES, Format.NDJSON, (), is_safe=False)
    for number in range(50):
        row = {f"titel{number}": 1, **{f"name{number} {place}": 1 for place in range(40)}}
        problems = checker.check(Record(number, number + 1, 9, row))
        assert isinstance(problems, list)
        assert len(problems) == MAX_PROBLEMS_OF_ROW
        expected = "Unknown field; did you mean title?" if number == 0 else "Unknown field"
        assert problems[0] == (number, f"titel{number}", expected)
    assert len(compared) == MAX_SUGGESTIONS
    begun = time.perf_counter()
    (problem,) = columns_of(MOVIES, [str(number) for number in range(50_000)])
    assert problem.msg == f"Expected at most {MAX_MEMBERS} columns, got 50,000"
    assert time.perf_counter() - begun < 1


def test_every_transferred_resource_has_a_kind_of_job() -> None:
    assert {f"{imports.KIND}{each.name}" for each in RESOURCES if each.transferred} <= set(get_args(Kind))


# --- a runner without a service


async def identity(database: Database) -> Identity:
    return Identity(await account(database, "alice"), Group.USER, 2.0**40, "a session", None)


async def run(
    database: Database, me: Identity, content: bytes, columns: tuple[str, ...] = ("title", "description")
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Import movies from CSV. Return the counts of the report, and the problems."""
    job_id = await ordered(database, me, content, columns)
    runner = Runner(database)
    running = asyncio.create_task(runner.run())

    async def has_ended() -> bool:
        job = await jobs.find(database, job_id)
        return job is not None and job["state"] == "done"

    await eventually(has_ended, "the import has ended")
    runner.stop()
    await running
    report = await imports.report(database, job_id)
    assert report is not None
    return report.counts, [json.loads(line) for line in report.problems.splitlines()]


async def ordered(
    database: Database, me: Identity, content: bytes, columns: tuple[str, ...], origin: Origin | None = None
) -> str:
    """Queue an import of movies from CSV, and return the id of its job."""
    job_id = str(uuid.uuid4())
    await imports.store_part(database, job_id, 0, zlib.compress(content))
    job = JobOrder("import_movies", content.count(b"\n"), seed=0, batch_size=1, rate=None)
    details = ImportOrder("csv", columns, False, False, False, len(content), 0)

    async def work(tx: Transaction) -> None:
        await jobs.create(tx, me, job, None, origin, job_id=job_id)
        await imports.create(tx, job_id, details)

    await database.write(work)
    return job_id


async def test_a_chunk_that_is_too_large_for_one_transaction_is_divided(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transaction, "MAX_TRANSACTION_BYTES", 20_000)
    huge = csv_of(["y", "x" * 9_900 * 2])[:-2] + b"\r\n"
    content = many(200) + csv_of(["y", "\u00e9" * 9_990]) + csv_of(["z", "last"]) + huge
    counts, problems = await run(database, await identity(database), content)
    assert (counts["added"], counts["failed"]) == (201, 2)
    assert [problem["field"] for problem in problems] == ["", "description"]
    assert await imports.discard_unused(database, datetime.now(UTC)) == 0, "the runner has deleted the file"


async def test_rows_that_name_unknown_rows_are_refused_together(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    me, attempts, edit_bulk = await identity(database), list[int](), writes.edit_bulk

    async def counted(tx: Transaction, resource: Resource, by: Identity, edits: Any) -> Any:
        attempts.append(len(edits))
        return await edit_bulk(tx, resource, by, edits)

    monkeypatch.setattr(writes, "edit_bulk", counted)
    await database.write(lambda tx: writes.store(tx, MOVIES, [{"title": "old"}] * 300, me.user_id))
    rows = [(n, "new", '["Unknown"]' if n % 3 else "") for n in range(1, 301)]
    counts, problems = await run(database, me, csv_of(("id", "title", "genres"), *rows), ("id", "title", "genres"))
    assert (counts["updated"], counts["failed"], attempts) == (100, 200, [300, 100])
    assert [problem["line"] for problem in problems] == [n + 1 for n in range(1, 301) if n % 3]
    # Only the last row with an id is checked, so the others need further attempts, and then smaller chunks.
    rows = [(1, f"title {n}", '["Unknown"]' if n else "") for n in range(30)]
    counts, problems = await run(database, me, csv_of(("id", "title", "genres"), *rows), ("id", "title", "genres"))
    assert (counts["updated"], counts["failed"], len(problems)) == (1, 29, 29)


async def test_receiving_a_file_is_interrupted_only_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "FILE_SECONDS", 0.05)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x", "more_body": True}

    request = Request({"type": "http", "headers": [], "state": {"stopping": Stopping()}}, receive)
    stored: list[bytes] = []

    async def store() -> None:
        async for part in uploads.stream(request, 1_000):
            await asyncio.sleep(0.1)
            stored.append(part)

    with pytest.raises(RequestTimeout):
        await store()
    assert stored == [b"x"]


async def test_files_without_a_job_are_deleted_after_a_while(database: Database) -> None:
    await imports.store_part(database, "no job", 0, b"")
    now = datetime.now(UTC)
    assert await imports.discard_unused(database, now - timedelta(hours=1)) == 0
    assert await imports.discard_unused(database, now + timedelta(hours=1)) == 1


async def test_one_network_may_store_a_quarter_of_all_files(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert imports.MAX_STORED_PARTS_PER_NETWORK * 4 <= imports.MAX_STORED_PARTS
    assert in_progress.MAX_UPLOADS_PER_ADDRESS * 4 <= in_progress.MAX_UPLOADS
    assert in_progress.MAX_EXPORTS_PER_ADDRESS * 4 <= in_progress.MAX_EXPORTS
    monkeypatch.setattr(imports, "MAX_STORED_PARTS_PER_NETWORK", 2)
    me = await identity(database)
    for network in ("192.0.2.1", "192.0.2.1", "192.0.2.2"):
        job_id = await ordered(database, me, b"title\n", ("title",), Origin(network, 8))
    await imports.require_room(database, None, "192.0.2.2")
    with pytest.raises(TooManyRequests, match=r"from 192\.0\.2\.1 take"):
        await imports.require_room(database, None, "192.0.2.1")
    monkeypatch.setattr(imports, "MAX_STORED_PARTS", 3)
    with pytest.raises(TooManyRequests, match="The files of unfinished imports take"):
        await imports.require_room(database, None, "192.0.2.2")
    await imports.discard(database, job_id)
    await imports.require_room(database, None, "192.0.2.2")
