"""Compares the tables in the database with `models` every second while the service runs.

A query need not fail after the type of a column has been changed. Instead, the driver may return values of another
type, which any part of the code may misunderstand or fail on. So while a column has an unexpected type, every read and
write is rejected, and an unexpected error is not treated as a bug before the tables have been compared.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import structlog
from sqlalchemy import Column
from sqlalchemy.dialects import postgresql

import models
from core.errors import Unavailable
from repository.engine import failures
from repository.engine.statement import Statement

RECENT_SECONDS = 1.0  # the tables are compared this often; a comparison costs the database about a millisecond

Types = Mapping[tuple[str, str], str]  # the type of each column, by table and column

_COLUMNS = Statement(
    sqlite="SELECT tables.name, columns.name, ''"
    " FROM sqlite_master AS tables JOIN pragma_table_info(tables.name) AS columns",
    postgresql="SELECT relname, attname, format_type(atttypid, NULL)"
    " FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid"
    " WHERE relname = ANY($1::text[]) AND pg_table_is_visible(pg_class.oid) AND attnum > 0 AND NOT attisdropped",
)
_DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]
# For each type in `models`, the types whose values the driver returns and accepts in the same form.
_STRINGS = ("character varying", "text")
_SAME_FORM: Mapping[str, tuple[str, ...]] = {
    "BIGINT": ("bigint",),
    "BOOLEAN": ("boolean",),
    "BYTEA": ("bytea",),
    "DATE": ("date",),
    "FLOAT": ("double precision",),
    "INTEGER": ("integer", "bigint"),
    "JSONB": ("jsonb",),
    "SMALLINT": ("smallint", "integer", "bigint"),
    "TEXT": _STRINGS,
    "TIMESTAMP WITH TIME ZONE": ("timestamp with time zone",),
    "VARCHAR": _STRINGS,
}

log = structlog.get_logger("database")


@dataclass(frozen=True, slots=True)
class Difference:
    """The first difference between the tables and the models. `is_type` is False if a table or a column is missing."""

    words: str
    is_type: bool


class Schema:
    """The newest comparison of a database's tables with the models. `fetch` returns the rows of a statement, even while
    a column has an unexpected type, and raises Unavailable.
    """

    def __init__(self, fetch: Callable[..., Awaitable[Sequence[Any]]], *, is_sqlite: bool) -> None:
        self._fetch = fetch
        self._is_sqlite = is_sqlite
        self._comparing = asyncio.Lock()
        self._compared_at = -math.inf
        self._found: Difference | None = None

    def require(self) -> None:
        """Raise Unavailable while a column has an unexpected type."""
        if self._found is not None and self._found.is_type:
            raise Unavailable(f"The database is unavailable: {self._found.words}. Nothing was written; try again later")

    def expire(self) -> None:
        """Make the next call of `problem` compare the tables, because a database error may be about a table."""
        self._compared_at = -math.inf

    async def problem(self) -> str | None:
        """Return what is wrong with the tables, or None. Raises Unavailable."""
        await self._compare(time.monotonic() - RECENT_SECONDS)
        return self._found.words if self._found is not None else None

    async def explain(self, error: Exception) -> Unavailable | None:
        """Return the error for the client if `error` may come from the type of a column, or if the database cannot be
        reached to find out. Return None if `error` is a bug.
        """
        try:
            # A difference that was just found is not checked again: even if the type has been corrected since, the
            # error may come from values that were read before.
            if self._found is None or time.monotonic() - self._compared_at > RECENT_SECONDS:
                await self._compare(time.monotonic())
        except Unavailable as unavailable:
            log.error("unexpected error while the database was unavailable", exc_info=error)
            return unavailable
        if self._found is None or not self._found.is_type:
            return None
        log.warning("database unavailable", reason=self._found.words, error=failures.first_line(error))
        outcome = "it is unknown whether anything was written"
        return Unavailable(f"The database is unavailable: {self._found.words}; {outcome}")

    async def run(self) -> None:
        """Compare the tables until cancelled."""
        while True:
            await asyncio.sleep(RECENT_SECONDS)
            try:
                await self.problem()
            except Unavailable:
                pass  # other parts of the service report this
            except Exception as bug:
                # An error here must not end the process, which also serves clients.
                log.error("tables not compared", exc_info=bug)

    async def _compare(self, since: float) -> None:
        """Compare the tables, unless a comparison has begun at `since` or later. Raises Unavailable."""
        async with self._comparing:
            if self._compared_at >= since:
                return
            began, before = time.monotonic(), self._found
            rows = await self._fetch(_COLUMNS, *(() if self._is_sqlite else [list(models.metadata.tables)]))
            found = difference({(table, column): kind for table, column, kind in rows}, is_sqlite=self._is_sqlite)
            self._compared_at, self._found = began, found
        if found is not None and found != before:
            log.warning("tables not as expected", reason=found.words)
        elif found is None and before is not None:
            log.info("tables as expected again")


def difference(found: Types, *, is_sqlite: bool) -> Difference | None:
    """Return the first difference between the columns in the database and those in `models`. Pure.

    On SQLite, only missing tables and columns count, because there the declared type of a column does not determine
    the types of its values. A changed type takes precedence over a missing table or column.
    """
    for (table, column), allowed in () if is_sqlite else _expected().items():
        kind = found.get((table, column))
        if kind is not None and kind not in allowed:
            words = f"{failures.COLUMN_CHANGED}: {table}.{column} is {kind}, expected {allowed[0]}"
            return Difference(words, is_type=True)
    tables = {table for table, _ in found}
    for table, column in _expected():
        if table not in tables:
            return Difference(f"{failures.TABLE_MISSING}: {table}", is_type=False)
        if (table, column) not in found:
            return Difference(f"{failures.COLUMN_MISSING}: {table}.{column}", is_type=False)
    return None


@cache
def _expected() -> Mapping[tuple[str, str], tuple[str, ...]]:
    """Return the types that each column may have on PostgreSQL, by table and column."""

    def allowed(column: Column[Any]) -> tuple[str, ...]:
        return _SAME_FORM[column.type.compile(dialect=_DIALECT).partition(" COLLATE ")[0].partition("(")[0]]

    columns = [column for table in models.metadata.sorted_tables for column in table.columns]
    return {(str(column.table.name), str(column.name)): allowed(column) for column in columns}
