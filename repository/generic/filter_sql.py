"""Filters as SQL, with the same meaning as in `core/filters.py` on both databases."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    FromClause,
    String,
    Table,
    Text,
    and_,
    bindparam,
    collate,
    func,
    literal,
    or_,
    select,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.sql.elements import True_

from core.filters import COMPARISONS, Condition, FieldType, Filter, Op
from core.texts.normal import without_case
from repository import search as index
from resources.resource import Link

# Reads up to this cost are light. The unit is the cost of one comparison for each row of the table. With 200,000 rows,
# a read of the highest light cost takes about 0.2 s on SQLite.
MAX_LIGHT_COST = 6
# A condition on a column that holds lists decodes the list of each row.
LIST_COST = 5
# How many values of an `in` add 1 to its cost: on a column that holds lists, and on any other column.
LISTED_VALUES_PER_COST = 10
VALUES_PER_COST = 25


def is_costly(wanted: Filter) -> bool:
    """Return whether testing every row of a table against the filter takes too long for a light read."""
    return wanted.searches > 0 or cost(wanted) > MAX_LIGHT_COST


def cost(wanted: Filter) -> int:
    """Return the cost of testing every row of a table against a filter without string searches."""
    return sum(_cost(condition) for group in wanted.groups for condition in group)


def _cost(condition: Condition) -> int:
    values = len(condition.value) if isinstance(condition.value, tuple) else 1
    if condition.field.kind is FieldType.STRINGS:
        return LIST_COST + values // LISTED_VALUES_PER_COST
    return 1 + values // VALUES_PER_COST


def where(table: Table, wanted: Filter, *, is_sqlite: bool) -> ColumnElement[bool]:
    """Return the SQL condition for rows that match the filter."""
    clauses = [_clause(table, condition, is_sqlite) for condition in wanted.all]
    for alternatives in filter(None, (wanted.any, wanted.also)):
        groups = [and_(*(_clause(table, condition, is_sqlite) for condition in group)) for group in alternatives]
        clauses += [or_(*groups)]
    return and_(literal(True), *clauses)


def linked(
    table: Table, link: Link, where: ColumnElement[bool], name: str
) -> tuple[FromClause, FromClause, Column[int], ColumnElement[bool]]:
    """Return how to read the rows that link to the row whose id, or code, is the parameter `name`: where the rows are
    read from, where they are counted, the column of their ids, and the condition.

    The ids come from the table of links, whose index yields them in order. Without another condition, that table alone
    is counted.
    """
    if link.table is None:
        column = table.c[link.column]
        return table, table, table.c.id, and_(where, column == bindparam(name, type_=column.type))
    linked_id, owner_id = (link.table.c[column] for column in link.ids)
    joined = table.join(link.table, table.c.id == owner_id)
    counted = link.table if isinstance(where, True_) else joined
    return joined, counted, owner_id, and_(where, linked_id == bindparam(name, type_=BigInteger))


def search(table: Table, columns: Iterable[str], text: str, *, is_sqlite: bool) -> ColumnElement[bool]:
    """Return the SQL condition that each word of `text` occurs in one of the columns, ignoring case."""
    return search_in([table.c[name] for name in columns], text, is_sqlite=is_sqlite)


def search_in(searched: Sequence[ColumnElement[Any]], text: str, *, is_sqlite: bool) -> ColumnElement[bool]:
    """Return the SQL condition that each word of `text` occurs in one of the searched texts, ignoring case.

    Lowercasing is most of the cost, so the texts are joined and lowercased once for all words. No word contains the
    line break that separates the texts.
    """
    words = list(dict.fromkeys(without_case(text).split()))
    if is_sqlite:
        return func.has_words(" ".join(words), *searched, type_=Boolean)
    joined = func.concat_ws("\n", *searched, type_=String)
    patterns = [f"%{_escaped(word)}%" for word in words]
    return _lower(joined, is_sqlite).like(func.all(bindparam(None, patterns, type_=ARRAY(Text()))))


def _escaped(word: str) -> str:
    return re.sub(r"([\\%_])", r"\\\1", word)


def _lower(column: ColumnElement[str], is_sqlite: bool) -> ColumnElement[str]:
    # Both databases then lowercase all of Unicode, as Python does. By default, SQLite's `lower` covers only ASCII, and
    # PostgreSQL's depends on the locale.
    lower = func.unicode_lower(column) if is_sqlite else func.lower(collate(column, "und-x-icu"))
    return func.replace(lower, "ς", "σ", type_=String)


def _clause(table: Table, condition: Condition, is_sqlite: bool) -> ColumnElement[bool]:
    if condition.op is Op.SEARCH:
        return index.matches(table, str(condition.value), is_sqlite=is_sqlite)
    column: ColumnElement[Any] = table.c[condition.field.column]
    if condition.field.kind is FieldType.INTEGER:
        # The value is sent as the widest integer type, so that a value beyond the column's range matches nothing
        # instead of failing.
        column = type_coerce(column, BigInteger)
    value = condition.value
    if condition.field.kind is FieldType.STRINGS:
        wanted = [str(item) for item in (value if isinstance(value, tuple) else (value,))]
        holds = _holds_any(column, wanted, is_sqlite)
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


def _holds_any(column: ColumnElement[list[str]], items: list[str], is_sqlite: bool) -> ColumnElement[bool]:
    """Return the SQL condition that the list in `column` holds one of the items. A row's list is read only once."""
    if is_sqlite:
        each = func.json_each(column).table_valued("value")
        return select(literal(1)).select_from(each).where(each.c.value.in_(items)).exists()
    holds: ColumnElement[bool] = type_coerce(column, JSONB).has_any(bindparam(None, items, type_=ARRAY(Text())))
    return holds
