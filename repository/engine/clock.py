"""The database's clock, in seconds since 1970: leases compare one clock with itself, however many machines work."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Float, literal_column


def now(*, is_sqlite: bool) -> ColumnElement[Any]:
    if is_sqlite:
        return literal_column("((julianday('now') - 2440587.5) * 86400.0)", Float)
    return literal_column("extract(epoch from clock_timestamp())::double precision", Float)
