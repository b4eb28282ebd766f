"""Filters as SQL, with the meaning of `core/filters.py` on both databases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, String, Table, and_, collate, func, literal, or_, select, type_coerce
from sqlalchemy.dialects.postgresql import JSONB

from core.filters import COMPARISONS, Condition, FieldType, Filter, Op, without_case


def where(table: Table, wanted: Filter, *, is_sqlite: bool) -> ColumnElement[bool]:
    """Return the condition that a row matches the filter."""
    clauses = [_clause(table, condition, is_sqlite) for condition in wanted.all]
    if wanted.any:
        groups = (and_(*(_clause(table, condition, is_sqlite) for condition in group)) for group in wanted.any)
        clauses.append(or_(*groups))
    return and_(literal(True), *clauses)


def search(table: Table, columns: Iterable[str], text: str, *, is_sqlite: bool) -> ColumnElement[bool]:
    """Return the condition that each word of `text` occurs in one of the columns, ignoring case."""
    words = without_case(text).split()
    return and_(
        literal(True),
        *(
            or_(*(_lower(table.c[name], is_sqlite).contains(word, autoescape=True) for name in columns))
            for word in words
        ),
    )


def _lower(column: ColumnElement[str], is_sqlite: bool) -> ColumnElement[str]:
    # Both functions lowercase all of Unicode, as Python does; the defaults lowercase only ASCII or follow a locale.
    lower = func.unicode_lower(column) if is_sqlite else func.lower(collate(column, "und-x-icu"))
    return func.replace(lower, "ς", "σ", type_=String)


def _clause(table: Table, condition: Condition, is_sqlite: bool) -> ColumnElement[bool]:
    column: ColumnElement[Any] = table.c[condition.field.column]
    if condition.field.kind is FieldType.INTEGER:
        # Sent as the widest integer, so that a number beyond the column's range matches nothing instead of failing.
        column = type_coerce(column, BigInteger)
    value = condition.value
    if condition.field.kind is FieldType.STRINGS:
        wanted = value if isinstance(value, tuple) else (value,)
        holds = or_(*(_holds(column, str(item), is_sqlite) for item in wanted))
        return ~holds if condition.op is Op.NE else holds
    match condition.op:
        case Op.NE:
            return column.is_distinct_from(value)
        case Op.IN:
            assert isinstance(value, tuple)
            return column.in_(value)
        case Op.CONTAINS:
            return _lower(column, is_sqlite).contains(without_case(str(value)), autoescape=True)
        case Op.PREFIX:
            return _lower(column, is_sqlite).startswith(without_case(str(value)), autoescape=True)
    compared: ColumnElement[bool] = COMPARISONS[condition.op](column, value)
    return compared


def _holds(column: ColumnElement[list[str]], item: str, is_sqlite: bool) -> ColumnElement[bool]:
    if is_sqlite:
        each = func.json_each(column).table_valued("value")
        return select(literal(1)).select_from(each).where(each.c.value == item).exists()
    return type_coerce(column, JSONB).contains([item])
