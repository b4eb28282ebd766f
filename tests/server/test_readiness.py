"""`/readyz` reports what is wrong with the database, and the service recovers by itself."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest

from tests.conftest import Places
from tests.support.backends import POSTGRES_ONLY
from tests.support.locks import head_locked
from tests.support.requests import ok
from tests.support.resources import sql
from tests.support.servers.postgresql import PostgresServer
from tests.support.service import PASSWORD, Service, eventually


async def database_check(client: httpx.AsyncClient, status: int) -> str | None:
    """Return what `/readyz` reports about the database if it responds with this status, otherwise None."""
    answer = await client.get("/readyz")
    return str(answer.json()["checks"]["database"]) if answer.status_code == status else None


async def is_ready(client: httpx.AsyncClient) -> bool:
    return await database_check(client, 200) == "ok"


async def test_a_foreign_lock_on_the_log_is_reported(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.person() as alice, service.anyone() as operator:
        async with head_locked(service.database_url):
            write = asyncio.create_task(alice.http.post("/movies", json={"title": "Blocked"}))
            said = await eventually(lambda: database_check(operator, 503), "not ready")
            assert said.startswith("writes have been waiting for a lock for ")
            details = await operator.get("/readyz", headers={"Accept": "application/problem+json"})
            assert (details.status_code, details.json()["status"]) == (503, 503)
            assert details.json()["detail"].startswith("database: writes have been waiting for a lock for ")
            assert details.json()["checks"]["service"] == "ok"
            await ok(operator.get("/movies"))
        await ok(write, 201)
        await eventually(lambda: is_ready(operator), "ready again")


@POSTGRES_ONLY
async def test_a_foreign_lock_on_tables_is_reported(backend: str, new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.person() as alice, service.anyone() as operator:
        foreign = await asyncpg.connect(service.database_url)
        try:
            await foreign.execute("BEGIN; LOCK TABLE sessions, event_head")
            assert (await alice.http.get("/users/me")).status_code == 503
            said = "writes wait for a lock that another transaction holds: event_head, sessions"

            async def is_reported() -> bool:
                return await database_check(operator, 503) == said

            await eventually(is_reported, "not ready")
            assert await is_reported(), "the lock is reported until it is released, even if no further request fails"
        finally:
            await foreign.close()
        await eventually(lambda: is_ready(operator), "ready again")
        await ok(alice.http.get("/users/me"))


# --- database faults


@dataclass(frozen=True)
class Fault:
    """Statements that break the database `{database}` of the role `{role}`, and statements that repair it.

    `said` is what `/readyz` reports.
    """

    breaks: tuple[str, ...]
    mends: tuple[str, ...]
    said: str
    refused: str = "GET"


CLOSED = "ALTER DATABASE {database} ALLOW_CONNECTIONS false"
CUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{role}'"
LOST_TABLE = Fault(
    ("ALTER TABLE movies RENAME TO away",), ("ALTER TABLE away RENAME TO movies",), "a table is missing: movies"
)
FAULTS = {
    "renamed database": Fault(
        (CLOSED, CUT, "ALTER DATABASE {database} RENAME TO {database}_away"),
        ("ALTER DATABASE {database}_away RENAME TO {database}", "ALTER DATABASE {database} ALLOW_CONNECTIONS true"),
        "the database does not exist",
    ),
    "role without login": Fault(
        ("ALTER ROLE {role} NOLOGIN", CUT), ("ALTER ROLE {role} LOGIN",), "the database rejects the service's role"
    ),
    "lost table": LOST_TABLE,
    "changed column": Fault(
        ("ALTER TABLE movies ALTER COLUMN version TYPE boolean USING version::integer::boolean",),
        ("ALTER TABLE movies ALTER COLUMN version TYPE integer USING version::integer",),
        "a column has an unexpected type: movies.version is boolean, expected integer",
        refused="POST",
    ),
    "changed head": Fault(
        ("ALTER TABLE event_head ALTER COLUMN seq TYPE text",),
        ("ALTER TABLE event_head ALTER COLUMN seq TYPE bigint USING seq::bigint",),
        "a column has an unexpected type: event_head.seq is text, expected bigint",
        refused="POST",
    ),
}


@dataclass(frozen=True)
class Superuser:
    """Runs statements about tables in a service's database, and all others in the database `postgres`."""

    server_url: str
    database: str
    role: str

    async def run(self, statements: Iterable[str]) -> None:
        for statement in statements:
            name = self.database if "TABLE" in statement else "postgres"
            connection = await asyncpg.connect(f"{self.server_url}/{name}")
            try:
                await connection.execute(statement.format(database=self.database, role=self.role))
            finally:
                await connection.close()


@pytest.fixture
async def superuser(postgres: PostgresServer) -> Superuser:
    """The superuser of a new database that has its own role, so that the faults affect no other test."""
    url = urlsplit(postgres.create_database())
    found = Superuser(f"postgresql://{url.netloc}", url.path[1:], f"role_of_{url.path[1:]}")
    await found.run(("CREATE ROLE {role} LOGIN", "ALTER DATABASE {database} OWNER TO {role}"))
    return found


async def is_refused(client: httpx.AsyncClient, path: str) -> bool:
    answer = await client.get(path)
    assert answer.status_code in (200, 503), answer.text
    return answer.status_code == 503


@asynccontextmanager
async def service_of(superuser: Superuser, new_service: Callable[..., Service]) -> AsyncIterator[Service]:
    server = superuser.server_url.replace("postgres@", f"{superuser.role}@")
    yield new_service(Places(f"{server}/{superuser.database}", "memory://")).start()


@POSTGRES_ONLY
async def test_no_fault_of_the_database_ends_the_service(
    backend: str, superuser: Superuser, new_service: Callable[..., Service]
) -> None:
    async with service_of(superuser, new_service) as service, service.person() as alice, service.anyone() as operator:
        pid = service.pid
        async with service.watch() as watcher:
            for name, fault in FAULTS.items():
                await superuser.run(fault.breaks)
                try:
                    if fault.refused == "POST":
                        answer = await alice.http.post("/movies", json={"title": name})
                        assert answer.status_code == 503, answer.text
                    else:
                        await eventually(lambda: is_refused(operator, "/movies"), f"{name}: a list is refused")
                    said = await eventually(lambda: database_check(operator, 503), f"{name}: not ready")
                    assert said == fault.said, name
                    assert (await operator.get("/healthz")).status_code == 200
                finally:
                    await superuser.run(fault.mends)
                await eventually(lambda: is_ready(operator), f"{name}: ready again")
                movie = await alice.add(title=name)
                assert (await watcher.expect("add", "movies"))["data"] == movie
            # Clients do not notice that the database server has closed the service's connections.
            await superuser.run((CUT,))
            for path in ("/movies", "/movies?title=x", f"/movies/{movie['id']}", "/users/me", "/jobs"):
                await ok(alice.http.get(path))
            assert (await watcher.sees(await alice.add(title="after")))["operation"] == "add"
        assert service.process is not None
        assert service.process.poll() is None
        assert service.pid == pid


async def is_tried_again(service: Service, job_id: str) -> None:
    """Wait until a running job has been claimed and released several times. Each claim changes its lease."""
    seen: set[Any] = set()

    async def has_changed() -> bool:
        seen.update(await sql(service, f"SELECT lease_until FROM jobs WHERE id = '{job_id}'"))
        return len(seen) > 4

    await eventually(has_changed, f"job {job_id} is tried again")


async def test_a_lost_head_of_the_log_is_reported_and_delays_jobs(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.person() as alice, service.anyone() as operator, service.watch() as watcher:
        await alice.add(title="before")
        job = await alice.generate("movies", 30, "?rate=10&batch_size=1")
        await watcher.until(lambda frame: frame["operation"] == "add_bulk")
        [(epoch, seq)] = await sql(service, "DELETE FROM event_head RETURNING epoch, seq")
        said = await eventually(lambda: database_check(operator, 503), "not ready")
        assert said == "The event log has no head"
        requests: tuple[tuple[str, str, Any], ...] = (
            ("GET", "/movies", None),
            ("GET", "/movies?title=x", None),
            ("GET", "/jobs", None),
            ("POST", "/movies", {"title": "Refused"}),
            ("POST", "/movies/generate/3", None),
            ("POST", "/auth/login", {"username": alice.name, "password": PASSWORD}),
        )
        for method, path, body in requests:
            answer = await alice.http.request(method, path, json=body)
            assert answer.status_code == 503, (method, path, answer.text)
        reply = await watcher.ask({"action": "subscribe", "topics": ["movies"], "snapshot": True})
        assert reply["error"]["code"] == "unavailable"
        await is_tried_again(service, job["id"])
        assert (await ok(alice.http.get(f"/jobs/{job['id']}")))["state"] == "running"
        columns = f"(id, epoch, seq, size) VALUES (1, '{epoch}', {seq}, 0)"
        await sql(service, f"INSERT INTO event_head {columns}")
        await eventually(lambda: is_ready(operator), "ready again")
        added = await alice.add(title="after")
        await watcher.until(lambda frame: frame.get("data") == added)  # the job may go on before
        assert (await alice.job_ended(job["id"]))["state"] == "done"


# For each column: a wrong type, the right type, and a URL whose response depends on the column.
CHANGED_TYPES = {
    ("movies", "id"): ("numeric", "bigint", "/movies/1"),
    ("movies", "title"): ("bytea USING title::bytea", "text USING convert_from(title, 'UTF8')", "/movies"),
    ("events", "seq"): ("numeric", "bigint", "/events"),
    ("users", "version"): ("numeric", "integer", "/users/me"),
    ("users", "is_active"): ("text", "boolean USING is_active::boolean", "/users/me"),
    ("jobs", "total"): ("numeric", "integer", "/jobs"),
}


@POSTGRES_ONLY
async def test_a_changed_type_of_a_column_is_a_503_until_it_is_corrected(
    backend: str, new_service: Callable[..., Service]
) -> None:
    service = new_service().start()
    async with service.person() as alice, service.anyone() as operator, service.watch() as watcher:
        await alice.add(title="before")
        job = await alice.generate("movies", 100, "?rate=20&batch_size=1")
        await watcher.until(lambda frame: frame["operation"] == "add_bulk")
        for (table, column), (wrong, right, path) in CHANGED_TYPES.items():
            await sql(service, f"ALTER TABLE {table} ALTER COLUMN {column} TYPE {wrong}")
            try:
                await eventually(partial(is_refused, alice.http, path), f"{path} is refused")
                said = await eventually(lambda: database_check(operator, 503), f"{table}.{column}: not ready")
                assert said.startswith(f"a column has an unexpected type: {table}.{column} is ")
                answer = await alice.http.get(path)
                assert (answer.status_code, f"{table}.{column}" in answer.text) == (503, True)
                answer = await alice.http.post("/movies", json={"title": "Refused"})
                assert answer.status_code == 503
                refused = await watcher.ask({"action": "subscribe", "topics": ["movies"], "snapshot": True})
                assert refused["error"]["code"] == "unavailable"
            finally:
                await sql(service, f"ALTER TABLE {table} ALTER COLUMN {column} TYPE {right}")
            await eventually(lambda: is_ready(operator), "ready again")
            await ok(alice.http.get(path))
        await watcher.until(lambda frame: frame["operation"] == "add_bulk")
        after = await alice.add(title="after")  # between two chunks of the job
        await watcher.until(lambda frame: frame["operation"] == "add" and frame["data"] == after)
        assert (await alice.job_ended(job["id"]))["state"] == "done"
        assert '"exc_info"' not in service.log()
        assert "Traceback" not in service.log()


async def test_a_lost_table_is_reported_until_it_is_back(new_service: Callable[..., Service]) -> None:
    service = new_service().start()

    async def run(statements: tuple[str, ...]) -> None:
        if service.database_url.startswith("sqlite"):
            file = sqlite3.connect(service.database_url.removeprefix("sqlite:///"))
            for statement in statements:
                file.execute(statement)
            file.close()
            return
        connection = await asyncpg.connect(service.database_url)
        for statement in statements:
            await connection.execute(statement)
        await connection.close()

    async with service.anyone() as operator:
        await run(LOST_TABLE.breaks)
        await eventually(lambda: is_refused(operator, "/movies"), "a list is refused")
        assert await eventually(lambda: database_check(operator, 503), "not ready") == LOST_TABLE.said
        await ok(operator.get("/genres"))
        await run(LOST_TABLE.mends)
        await eventually(lambda: is_ready(operator), "ready again")
        await ok(operator.get("/movies"))
