"""The types of the columns of tables, for SQLite and PostgreSQL alike."""

from __future__ import annotations

from datetime import date, datetime
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy import BigInteger, Dialect, Integer, String, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeEngine

from core.times import utc_text


class UtcTime(sa.TypeDecorator[str]):
    """A time: an RFC 3339 string in Python, TIMESTAMPTZ on PostgreSQL, text on SQLite."""

    impl = String(27)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(sa.DateTime(timezone=True))
        return dialect.type_descriptor(String(27))

    def process_bind_param(self, value: str | None, dialect: Dialect) -> Any:
        if value is None or dialect.name != "postgresql":
            return value
        return datetime.fromisoformat(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        return utc_text(value) if isinstance(value, datetime) else value


class IsoDate(sa.TypeDecorator[str]):
    """A date: a string `YYYY-MM-DD` in Python, DATE on PostgreSQL, text on SQLite."""

    impl = String(10)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(sa.Date())
        return dialect.type_descriptor(String(10))

    def process_bind_param(self, value: str | None, dialect: Dialect) -> Any:
        if value is None or dialect.name != "postgresql":
            return value
        return date.fromisoformat(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        return value.isoformat() if isinstance(value, date) else value


# SQLite generates the values of a primary key only if its type is spelled INTEGER.
Id = BigInteger().with_variant(Integer(), "sqlite")
Strings = sa.JSON().with_variant(JSONB(), "postgresql")


def text(length: int | None = None) -> TypeEngine[Any]:
    """Return the type of a string of at most `length` characters, or of any length, compared by code point."""
    kind = partial(String, length) if length else Text
    return kind().with_variant(kind(collation="C"), "postgresql")
