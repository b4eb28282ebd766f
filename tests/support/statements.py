"""The statements that a database runs, and the plans for them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import event, text

from repository.engine.database import Database


@asynccontextmanager
async def statements(database: Database) -> AsyncIterator[list[tuple[str, Any]]]:
    """Collect the reads that go through SQLAlchemy: their SQL text and their parameters."""
    found: list[tuple[str, Any]] = []
    engines = {reader.sync_engine for reader in database._engines.readers.values()}

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        found.append((statement, parameters))

    for engine in engines:
        event.listen(engine, "before_cursor_execute", note)
    yield found
    for engine in engines:
        event.remove(engine, "before_cursor_execute", note)


async def plan_of(database: Database, query: str, parameters: Any) -> str:
    """Return the plan of a query. PostgreSQL sorts rows or reads a whole table only if no index avoids it."""
    async with database.begin() as (connection, _):
        explain = "EXPLAIN QUERY PLAN"
        if not database.is_sqlite:
            explain = "EXPLAIN"
            await connection.execute(text("SET LOCAL enable_seqscan = off"))
            await connection.execute(text("SET LOCAL enable_sort = off"))
        return "\n".join(map(str, (await connection.exec_driver_sql(f"{explain} {query}", parameters)).all()))
