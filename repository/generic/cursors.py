"""Cursors: places in a list, from which a client continues while other rows are deleted and inserted.

A cursor is the base64url form, without padding, of a JSON array: a digest of the order it was made for, the integer
`after` of the request or null, and the values of the sort columns in the last row of a page, the id last. Clients treat
it as opaque. It is not signed: whatever a client puts in is checked and sent to the database as parameters, and shows
no rows that the list itself would not show. This module is pure: it does no I/O.
"""

from __future__ import annotations

import re
from base64 import b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import orjson
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Float,
    Integer,
    String,
    Table,
    and_,
    bindparam,
    or_,
)

from core import times
from core.databases import columns
from core.texts import tokens
from schemas import MAX_ID

MAX_CURSOR_BYTES = 2_048  # leaves room for the rest of a URL, which many proxies limit to 4 or 8 KiB
EXPECTED = "Expected a cursor from a `Link` header"
EXPECTED_SORT = "Expected a cursor from a `Link` header of this list with the same `sort` or, without one, `q`"
_TEXT = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_CURSOR_BYTES}}}")
_DIGEST_SIZE = 6  # bytes; it guards against mistakes, not against attacks

Order = tuple[tuple[str, bool], ...]  # (column, descending); the last column is the id
Value = int | float | str | bool | None


@dataclass(frozen=True, slots=True)
class Ordering:
    """What decides the order of a list: its table, and `order_of`, which returns the order for the client's `sort` and
    integer `after`. `ranked` is the ordering of a search without either, if searches are ranked.
    """

    table: Table
    order_of: Callable[[Order, int | None], Order]
    ranked: Ordering | None = None

    def for_search(self, text: str, sort: Order, after: int | None) -> Ordering:
        """Return the ordering of the rows that a search for `text` finds."""
        is_ranked = self.ranked is not None and not sort and after is None and tokens.query_of(text)
        return self.ranked if is_ranked and self.ranked is not None else self


def total_order(sort: Order) -> Order:
    """Return `sort` with the id as its last column, so that no two rows compare equal.

    Columns after the id, and a column that is named a second time, do not change the order and are left out.
    """
    order: dict[str, bool] = {}
    for name, is_descending in (*sort, ("id", False)):
        order.setdefault(name, is_descending)
        if name == "id":
            break
    return tuple(order.items())


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in a list: after the row with these `values` of the sort columns, in the form that clients see.

    `digest` identifies the order of the list. `after` is the integer `after` of the request, if it had one.
    """

    digest: str
    values: tuple[Value, ...]
    after: int | None = None


# --- the text


def digest_of(order: Order, text: str = "") -> str:
    """Return a short digest of the columns and directions and, for an order by rank, of the words of the search."""
    ordered = (order, tokens.query_of(text).exact.whole) if text else order
    return blake2b(repr(ordered).encode(), digest_size=_DIGEST_SIZE).hexdigest()


def encode(cursor: Cursor) -> str | None:
    """Return the cursor as text, or None if the text would be longer than MAX_CURSOR_BYTES."""
    content = orjson.dumps([cursor.digest, cursor.after, *cursor.values])
    text = urlsafe_b64encode(content).rstrip(b"=").decode()
    return text if len(text) <= MAX_CURSOR_BYTES else None


def decode(text: str) -> Cursor:
    """Return the cursor that a text encodes. The cursor may belong to another list.

    Raises ValueError, whose message says what was expected.
    """
    if not _TEXT.fullmatch(text):
        raise ValueError(EXPECTED)
    try:
        content = orjson.loads(b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True))
    except ValueError as error:
        raise ValueError(EXPECTED) from error
    match content:
        case [str(digest), after, *values]:
            has_after = after is None or (_is_integer(after) and 0 <= after <= MAX_ID)
            if has_after and all(value is None or isinstance(value, int | float | str) for value in values):
                return Cursor(digest, tuple(values), after)
    raise ValueError(EXPECTED)


def check(cursor: Cursor, ordering: Ordering, sort: Order, text: str = "") -> None:
    """Raise ValueError, whose message says what was expected, unless the cursor belongs to this list, `sort` and, in an
    order by rank, to a search for `text`.
    """
    found = ordering.for_search(text, sort, cursor.after)
    table, order = found.table, found.order_of(sort, cursor.after)
    if cursor.digest != digest_of(order, text if found is ordering.ranked else ""):
        raise ValueError(EXPECTED_SORT)
    columns = [table.c[name] for name, _ in order]
    # An integer `after` is compared with the id, which is a string in some lists.
    has_place = cursor.after is None or isinstance(table.c.id.type, Integer)
    if not has_place or len(cursor.values) != len(columns) or not all(map(_is_valid, columns, cursor.values)):
        raise ValueError(EXPECTED)


def _is_valid(column: Column[Any], value: object) -> bool:
    """Return whether the column could hold the value, or one of a wider type that the database can compare it with."""
    if value is None:
        return bool(column.nullable)
    match column.type:
        case Boolean():
            return isinstance(value, bool)
        case Integer():
            return _is_integer(value)
        case Float():
            return isinstance(value, float)
        # Other forms of a time or a date would be compared as strings on SQLite.
        case columns.UtcTime():
            return isinstance(value, str) and times.parse_time(value) == value
        case columns.IsoDate():
            return isinstance(value, str) and times.parse_date(value) == value
        case String():
            return isinstance(value, str) and "\x00" not in value
    return False


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


# --- the condition


def nulls_of(cursor: Cursor) -> tuple[bool, ...]:
    """Return which of the values are null, because the SQL of the condition differs for nulls."""
    return tuple(value is None for value in cursor.values)


def parameters(values: Iterable[Any]) -> dict[str, Any]:
    """Return the values by the names that they have in the condition."""
    return {_name(place): value for place, value in enumerate(values) if value is not None}


def _name(place: int) -> str:
    return f"cursor_{place}"


def rows_after(table: Table, order: Order, nulls: Sequence[bool]) -> ColumnElement[bool]:
    """Return the condition that a row comes after the cursor in this order, in which null is the last value of a column
    in both directions.

    `nulls` tells which values of the cursor are null. `parameters` returns the parameters for the other values.
    """
    found: ColumnElement[bool] | None = None
    for place in reversed(range(len(order))):
        name, is_descending = order[place]
        column = table.c[name]
        if nulls[place]:
            equal: ColumnElement[bool] = column.is_(None)
            after = None
        else:
            # The widest integer type, because a cursor from a client may hold a number beyond the column's range.
            kind = BigInteger() if isinstance(column.type, Integer) else column.type
            value: ColumnElement[Any] = bindparam(_name(place), type_=kind)
            equal = column == value
            after = column < value if is_descending else column > value
            if column.nullable:
                after = or_(after, column.is_(None))
        rest = and_(equal, found) if found is not None else None
        parts = [part for part in (after, rest) if part is not None]
        found = or_(*parts) if parts else found
    assert found is not None, "the id, the last column, is not null"
    return found


def at(order: Order, row: Mapping[str, Value], after: int | None, text: str = "") -> Cursor:
    """Return the cursor at a row, which holds the sort columns in the form that clients see. `text` is the search whose
    ranks decide the order.
    """
    return Cursor(digest_of(order, text), tuple(row[name] for name, _ in order), after)
