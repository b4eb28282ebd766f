"""The filter grammar: one parser for REST lists and subscriptions.

A filter is a conjunction of conditions `field operator value` and, optionally, one disjunction of groups of conditions.
A filter in a query string looks like `rating[gte]=50&or[0][genre]=Drama&or[1][country]=GB`; the same filter in JSON is
`{"rating": {"gte": 50}, "or": [{"genre": "Drama"}, {"country": "GB"}]}`. Without an operator, `eq` is used. Text is
compared by code point; `contains` and `prefix` ignore case. A null field matches only `ne`.

This module does no I/O. `core/texts/listed.py` parses lists in query strings, `repository/generic/filter_sql.py`
translates filters to SQL, and `routes/http/parameters.py` describes filters in the API. All of them must agree.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from core import times
from core.errors import MAX_PROBLEMS, FieldProblem, Loc, has_too_many_members
from core.texts import listed, numbers, tokens
from core.texts.normal import nfc, without_case
from core.texts.suggestions import Unknown

MAX_VALUES_IN_LIST = 100  # The maximum number of values in one `in` condition.
MAX_CONDITIONS = 200  # Enough conditions in one filter to use every field with every operator.
MAX_GROUPS = 20
MAX_TEXT_LENGTH = 1_000
MAX_LISTED_TEXT_LENGTH = 255  # A full list of values of this length fits into a URL of 64 KiB.


class FieldType(StrEnum):
    INTEGER = "integer"
    DECIMAL = "decimal"  # a number with a fraction, compared as a double on both databases and in Python
    TEXT = "text"
    DATE = "date"
    TIME = "time"
    BOOLEAN = "boolean"
    STRINGS = "strings"  # an array of strings: `eq` means "contains", `ne` "does not contain", `in` "contains one of"


class Op(StrEnum):
    EQ = "eq"
    NE = "ne"
    GT = "gt"
    GTE = "gte"
    LT = "lt"
    LTE = "lte"
    IN = "in"
    CONTAINS = "contains"
    PREFIX = "prefix"
    SEARCH = "search"  # only for the parameter `q`, never in a client's filter


_ORDERED = (Op.EQ, Op.NE, Op.GT, Op.GTE, Op.LT, Op.LTE, Op.IN)
OPERATORS: Mapping[FieldType, tuple[Op, ...]] = {
    **dict.fromkeys((FieldType.INTEGER, FieldType.DECIMAL, FieldType.DATE, FieldType.TIME), _ORDERED),
    FieldType.TEXT: (*_ORDERED, Op.CONTAINS, Op.PREFIX),
    FieldType.BOOLEAN: (Op.EQ, Op.NE),
    FieldType.STRINGS: (Op.EQ, Op.NE, Op.IN),
}

_TEXT = f"a string of at most {MAX_TEXT_LENGTH} characters without NUL"
EXPECTED: Mapping[FieldType, str] = {
    FieldType.INTEGER: "an integer of at most 64 bits",
    FieldType.DECIMAL: f"a number from -{numbers.MAX_DECIMAL} to {numbers.MAX_DECIMAL}",
    FieldType.TEXT: _TEXT,
    FieldType.DATE: "a date such as 1999-12-31",
    FieldType.TIME: "a time such as 1999-12-31T23:59:59Z",
    FieldType.BOOLEAN: "true or false",
    FieldType.STRINGS: _TEXT,
}

Scalar = int | float | str


@dataclass(frozen=True, slots=True)
class Field:
    """A filterable field. `name` is its name in filters, `column` its name in the entity.

    If there are `choices`, a value of `eq`, `ne` or `in` must be among them. `search` reads the columns `searched`.
    """

    name: str
    column: str
    kind: FieldType
    choices: tuple[str, ...] = ()
    searched: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Condition:
    field: Field
    op: Op
    value: Scalar | tuple[Scalar, ...]


@dataclass(frozen=True)
class Filter:
    """The conditions that a row must meet: every condition in `all` and, unless they are empty, every condition of at
    least one group in `any`, and of at least one group in `also`.

    Filters made by `build` are normalised: equivalent spellings compare equal. Only lists have `also` (`queries.both`).
    """

    all: tuple[Condition, ...] = ()
    any: tuple[tuple[Condition, ...], ...] = ()
    also: tuple[tuple[Condition, ...], ...] = ()

    @cached_property
    def _hash(self) -> int:
        return hash((self.all, self.any, self.also))

    def __hash__(self) -> int:
        # The hash is cached, because filters may be large and are looked up by hash for each event.
        return self._hash

    def __bool__(self) -> bool:
        return bool(self.all or self.any or self.also)

    @property
    def groups(self) -> tuple[tuple[Condition, ...], ...]:
        """All conditions: those in `all`, and each group in `any` and `also`."""
        return (self.all, *self.any, *self.also)

    @cached_property
    def size(self) -> int:
        """The number of conditions, including those in groups. Each word of a search counts."""
        return sum(
            tokens.size_of(str(one.value)) if one.op is Op.SEARCH else 1 for group in self.groups for one in group
        )

    @cached_property
    def searches(self) -> int:
        """The number of conditions that search in a string. Their cost grows with the length of the string."""
        return sum(one.op in (Op.CONTAINS, Op.PREFIX, Op.SEARCH) for group in self.groups for one in group)

    @cached_property
    def splits(self) -> bool:
        """Whether the strings of a row must be split into words."""
        return any(condition.op is Op.SEARCH for condition in self.all)


EVERYTHING = Filter()


def build(conditions: Iterable[Condition], groups: Iterable[Iterable[Condition]] = ()) -> Filter:
    """Return the normalised filter, whose conditions and groups are sorted and free of duplicates."""
    return Filter(_sorted(conditions), tuple(sorted({_sorted(group) for group in groups}, key=repr)))


def _sorted(conditions: Iterable[Condition]) -> tuple[Condition, ...]:
    # Conditions are sorted by `repr`, because values of different types cannot be compared.
    return tuple(sorted(set(conditions), key=repr))


# --- parsing

OR = "or"
_KEY = re.compile(r"^(?:or\[([0-9]{1,2})\]\[([a-z_]+)\]|([a-z_]+))(?:\[([a-z]+)\])?\Z")
_BOOLEANS: Mapping[str, bool] = {"true": True, "false": False}


class Parsed(NamedTuple):
    """The parsed filter, and the problems found in the input."""

    filter: Filter
    problems: list[FieldProblem]


def parse_query(
    items: Iterable[tuple[str, str]], fields: Mapping[str, Field], known: frozenset[str] = frozenset()
) -> Parsed:
    """Parse the items of a query string, ignoring the parameters named in `known`."""
    conditions: list[Condition] = []
    groups: dict[str, list[Condition]] = {}
    problems: list[FieldProblem] = []
    for key, raw in items:
        if key in known:
            continue
        loc = ("query", key)
        match = _KEY.match(key)
        name = (match[2] or match[3]) if match else ""
        if match is None or name not in fields:
            names = sorted((*known, *fields))
            expected = f"one of {', '.join(names)}" if names else "no parameters"
            message = f"Unknown parameter; expected {expected}"
            unknown = Unknown(name or key.partition("[")[0], names)
            problems.append(FieldProblem(loc, message, "unknown_parameter", unknown))
            continue
        op = match[4] or "eq"
        value = listed.split(raw) if op == Op.IN else raw
        found = _condition(fields[name], op, value) if value is not None else _Invalid(f"Expected {listed.EXPECTED}")
        if isinstance(found, _Invalid):
            problems.append(FieldProblem(loc, found.expected, found.type))
        else:
            (groups.setdefault(match[1], []) if match[1] is not None else conditions).append(found)
    problems.extend(_too_many(("query",), conditions, groups.values()))
    return Parsed(build(conditions, groups.values()), problems)


def parse_json(value: Any, fields: Mapping[str, Field], loc: Loc = ("filter",)) -> Parsed:
    """Parse the JSON form of a filter. The location of each problem begins with `loc`."""
    if not isinstance(value, dict):
        problem = FieldProblem(loc, 'Expected an object such as {"rating": {"gte": 50}}', "invalid_filter")
        return Parsed(EVERYTHING, [problem])
    problems: list[FieldProblem] = []
    members = {name: member for name, member in value.items() if name != OR}
    conditions = _parse_object(members, fields, loc, problems)
    given = value.get(OR, [])
    groups: list[list[Condition]] = []
    if OR in value and not (isinstance(given, list) and given and all(isinstance(one, dict) for one in given)):
        problems.append(FieldProblem((*loc, OR), "Expected a list of one or more filters", "invalid_filter"))
    else:
        for number, one in enumerate(given[: MAX_GROUPS + 1]):
            if not one:
                problems.append(FieldProblem((*loc, OR, number), "Expected at least one field", "invalid_filter"))
            groups.append(_parse_object(one, fields, (*loc, OR, number), problems))
    problems.extend(_too_many(loc, conditions, groups))
    return Parsed(build(conditions, groups), problems)


def _parse_object(
    value: Mapping[str, Any], fields: Mapping[str, Field], loc: Loc, problems: list[FieldProblem]
) -> list[Condition]:
    if has_too_many_members(value, loc, problems):
        return []
    conditions: list[Condition] = []
    for name, member in value.items():
        if len(problems) >= MAX_PROBLEMS:
            break
        field = fields.get(name)
        if field is None:
            names = ", ".join(sorted(fields))
            expected = "Groups cannot be nested" if name == OR else f"Unknown field; expected one of {names}"
            problems.append(FieldProblem((*loc, name), expected, "unknown_field", Unknown(name, fields)))
            continue
        if isinstance(member, dict) and not member:
            problems.append(FieldProblem((*loc, name), "Expected at least one operator", "invalid_filter"))
        if has_too_many_members(member, (*loc, name), problems):
            continue
        for op, raw in member.items() if isinstance(member, dict) else [("eq", member)]:
            found = _condition(field, op, _json_value(raw) if field.kind in _NO_TEXT else raw)
            if isinstance(found, _Invalid):
                place = (*loc, name, op) if isinstance(member, dict) else (*loc, name)
                problems.append(FieldProblem(place, found.expected, found.type))
            else:
                conditions.append(found)
    return conditions


_NO_TEXT = (FieldType.INTEGER, FieldType.DECIMAL, FieldType.BOOLEAN)


def _json_value(raw: Any) -> Any:
    """Return a JSON value in the form that number and boolean fields accept.

    A string becomes None, which is invalid. 50.0 becomes 50, an integer in JSON Schema 2020-12 (section 4.2.3).
    """
    if isinstance(raw, list):
        # Longer lists are invalid, and so are lists in lists, which may be nested too deeply to recurse.
        return [None if isinstance(item, list) else _json_value(item) for item in raw[: MAX_VALUES_IN_LIST + 1]]
    if isinstance(raw, str):
        return None
    return int(raw) if isinstance(raw, float) and raw.is_integer() else raw


def _too_many(loc: Loc, conditions: Iterable[Condition], groups: Iterable[Iterable[Condition]]) -> list[FieldProblem]:
    problems, sizes = [], [len(list(group)) for group in groups]
    if len(list(conditions)) + sum(sizes) > MAX_CONDITIONS:
        problems.append(FieldProblem(loc, f"Expected at most {MAX_CONDITIONS} conditions", "too_many_conditions"))
    if len(sizes) > MAX_GROUPS:
        problems.append(FieldProblem(loc, f"Expected at most {MAX_GROUPS} groups in `or`", "too_many_groups"))
    return problems


@dataclass(frozen=True, slots=True)
class _Invalid:
    expected: str
    type: str = "invalid_filter"


def _condition(field: Field, name: str, raw: Any) -> Condition | _Invalid:
    """Return the condition, or an `_Invalid` that states what was expected."""
    allowed = OPERATORS[field.kind]
    if name not in allowed:
        return _Invalid(f"Unknown operator; expected one of {', '.join(allowed)}", "unknown_operator")
    op = Op(name)
    if op is not Op.IN:
        value = _parse_value(field, op, raw)
        return Condition(field, op, value) if value is not None else _Invalid(_expected(field))
    if not isinstance(raw, list) or not 1 <= len(raw) <= MAX_VALUES_IN_LIST:
        return _Invalid(f"Expected 1 to {MAX_VALUES_IN_LIST} values")
    values = [_parse_value(field, op, item, MAX_LISTED_TEXT_LENGTH) for item in raw]
    if any(value is None for value in values):
        return _Invalid(f"{_expected(field)} for each value (comma-separated in a query, a list in JSON)")
    found = {value for value in values if value is not None}
    return Condition(field, op, tuple(sorted(found, key=lambda value: (str(type(value)), value))))


def _expected(field: Field) -> str:
    return f"Expected one of {', '.join(field.choices)}" if field.choices else f"Expected {EXPECTED[field.kind]}"


def _parse_value(field: Field, op: Op, raw: Any, max_length: int = MAX_TEXT_LENGTH) -> Scalar | None:
    kind = field.kind
    if kind is FieldType.BOOLEAN:
        return raw if isinstance(raw, bool) else _BOOLEANS.get(raw) if isinstance(raw, str) else None
    if kind is FieldType.INTEGER:
        return numbers.integer(raw)
    if kind is FieldType.DECIMAL:
        return numbers.decimal(raw)
    if not isinstance(raw, str) or "\x00" in raw:
        return None
    text = nfc(raw)  # strings are stored in normal form C
    if len(text) > max_length:
        return None
    if field.choices and op in (Op.EQ, Op.NE, Op.IN) and text not in field.choices:
        return None
    if kind is FieldType.DATE:
        return times.parse_date(text)
    if kind is FieldType.TIME:
        return times.parse_time(text)
    return text


# --- matching

Row = Mapping[str, Any]
# The lowercase strings and the tokens of one row, each made only once for all conditions and filters that need it.
Folded = dict[str, str | None]
_Test = Callable[[Row, Folded], bool]


class Matcher(Protocol):
    """A predicate on entities as `GET` returns them. `folded` caches the strings of the row for all filters."""

    def __call__(self, row: Row, folded: Folded | None = None) -> bool: ...


def matcher_of(wanted: Filter) -> Matcher:
    """Return the predicate of a filter. It matches the same rows as the SQL of that filter."""
    # Rows in events from before a migration lack newer columns. The tests of conditions treat these as null.
    tests = [_test(condition) for condition in wanted.all]
    groups = [[_test(condition) for condition in group] for group in wanted.any]
    assert not wanted.also, "expected a filter made by `build`"

    def matches(row: Row, folded: Folded | None = None) -> bool:
        if folded is None:
            folded = {}
        for test in tests:
            if not test(row, folded):
                return False
        return not groups or any(all(test(row, folded) for test in group) for group in groups)

    return matches


def _folded(row: Row, column: str, folded: Folded) -> str | None:
    """Return the lowercase form of a column's string, using the cache `folded`."""
    if column not in folded:
        text = row.get(column)
        folded[column] = without_case(text) if text is not None else None
    return folded[column]


def _test(condition: Condition) -> _Test:
    name, op, value = condition.field.column, condition.op, condition.value
    if condition.field.kind is FieldType.STRINGS:
        wanted = frozenset(value) if isinstance(value, tuple) else frozenset((value,))
        if op is Op.NE:
            return lambda row, folded: wanted.isdisjoint(row.get(name) or ())
        return lambda row, folded: not wanted.isdisjoint(row.get(name) or ())
    match op:
        case Op.EQ:
            return lambda row, folded: bool(row.get(name) == value)
        case Op.NE:
            return lambda row, folded: bool(row.get(name) != value)
        case Op.IN:
            assert isinstance(value, tuple)
            wanted = frozenset(value)
            return lambda row, folded: row.get(name) in wanted
        case Op.CONTAINS:
            part = without_case(str(value))
            return lambda row, folded: (text := _folded(row, name, folded)) is not None and part in text
        case Op.PREFIX:
            start = without_case(str(value))
            return lambda row, folded: (text := _folded(row, name, folded)) is not None and text.startswith(start)
        case Op.SEARCH:
            return tokens.finder(str(value), condition.field.searched)
    compare = COMPARISONS[op]
    return lambda row, folded: (held := row.get(name)) is not None and bool(compare(held, value))


COMPARISONS: Mapping[Op, Callable[[Any, Any], Any]] = {
    Op.EQ: operator.eq, Op.GT: operator.gt, Op.GTE: operator.ge, Op.LT: operator.lt, Op.LTE: operator.le
}  # fmt: skip
