"""The filter grammar, one parser for REST lists and subscriptions.

A filter is a conjunction of conditions `field operator value`. In a query it is written `rating[gte]=50`, in JSON
`{"rating": {"gte": 50}}`; no operator means `eq`. Text is compared by code point; `contains` and `prefix` ignore
case. A field without a value matches only `ne`. Pure: values in, values out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import times
from errors import FieldProblem

MAX_VALUES_IN_LIST = 100  # of one `in`
MAX_CONDITIONS = 200  # every field with every operator fits
MAX_TEXT_LENGTH = 1_000
MAX_LISTED_TEXT_LENGTH = 255  # in a list: all of one list fit into a URL, which HTTP parsers cut at 64 KiB
MAX_INTEGER = 2**63 - 1  # BIGINT


class Kind(StrEnum):
    INTEGER = "integer"
    TEXT = "text"
    DATE = "date"
    TIME = "time"
    STRINGS = "strings"  # an array of texts: eq means "holds", ne "does not hold", in "holds one of"


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


_ORDERED = (Op.EQ, Op.NE, Op.GT, Op.GTE, Op.LT, Op.LTE, Op.IN)
OPERATORS: Mapping[Kind, tuple[Op, ...]] = {
    Kind.INTEGER: _ORDERED,
    Kind.DATE: _ORDERED,
    Kind.TIME: _ORDERED,
    Kind.TEXT: (*_ORDERED, Op.CONTAINS, Op.PREFIX),
    Kind.STRINGS: (Op.EQ, Op.NE, Op.IN),
}

EXPECTED: Mapping[Kind, str] = {
    Kind.INTEGER: "an integer",
    Kind.TEXT: "a text",
    Kind.DATE: "a date such as 1999-12-31",
    Kind.TIME: "a time such as 1999-12-31T23:59:59Z",
    Kind.STRINGS: "a text",
}

Scalar = int | str


@dataclass(frozen=True, slots=True)
class Field:
    """A filterable field: `column` is its name in the entity, which the query name may differ from."""

    name: str
    column: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class Condition:
    field: Field
    op: Op
    value: Scalar | tuple[Scalar, ...]


_KEY = re.compile(r"^([a-z_]+)(?:\[([a-z]+)\])?\Z")
_INTEGER = re.compile(r"^-?[0-9]{1,19}\Z")


def _parse_value(kind: Kind, raw: Any, max_length: int = MAX_TEXT_LENGTH) -> Scalar | None:
    if kind is Kind.INTEGER:
        if isinstance(raw, str) and _INTEGER.match(raw):
            raw = int(raw)
        if isinstance(raw, int) and not isinstance(raw, bool) and abs(raw) <= MAX_INTEGER:
            return raw
        return None
    if not isinstance(raw, str) or "\x00" in raw or len(raw) > max_length:
        return None
    if kind is Kind.DATE:
        return times.parse_date(raw)
    if kind is Kind.TIME:
        return times.parse_time(raw)
    return raw


def parse_conditions(
    items: Iterable[tuple[str, str]], fields: Mapping[str, Field], known: frozenset[str] = frozenset()
) -> tuple[tuple[Condition, ...], list[FieldProblem]]:
    """Conditions from query items. Names in `known` belong to others and are passed over."""
    conditions: list[Condition] = []
    problems: list[FieldProblem] = []
    for key, raw in items:
        if key in known:
            continue
        loc = ("query", key)
        match = _KEY.match(key)
        field = fields.get(match[1]) if match else None
        if match is None or field is None:
            names = ", ".join(sorted((*known, *fields)))
            problems.append(FieldProblem(loc, f"Unknown parameter; expected one of {names}", "unknown_parameter"))
            continue
        allowed = OPERATORS[field.kind]
        if match[2] is not None and match[2] not in allowed:
            names = ", ".join(allowed)
            problems.append(FieldProblem(loc, f"Unknown operator; expected one of {names}", "unknown_operator"))
            continue
        op = Op(match[2] or "eq")
        condition = _condition(field, op, raw.split(",") if op is Op.IN else raw)
        if isinstance(condition, str):
            problems.append(FieldProblem(loc, condition, "invalid_filter"))
        else:
            conditions.append(condition)
    if len(conditions) > MAX_CONDITIONS:
        problems.append(
            FieldProblem(("query",), f"Expected at most {MAX_CONDITIONS} conditions", "too_many_conditions")
        )
    return tuple(conditions), problems


def without_case(text: str) -> str:
    """The form in which `contains`, `prefix` and search compare. A sigma lowers to another letter at a word's end."""
    return text.lower().replace("ς", "σ")


def _condition(field: Field, op: Op, raw: Any) -> Condition | str:
    """The condition, or the sentence that says what was expected."""
    if op is not Op.IN:
        value = _parse_value(field.kind, raw)
        return Condition(field, op, value) if value is not None else f"Expected {EXPECTED[field.kind]}"
    if not isinstance(raw, list) or not 1 <= len(raw) <= MAX_VALUES_IN_LIST:
        return f"Expected 1 to {MAX_VALUES_IN_LIST} values"
    values = [_parse_value(field.kind, item, MAX_LISTED_TEXT_LENGTH) for item in raw]
    if any(value is None for value in values):
        return f"Expected {EXPECTED[field.kind]}, comma separated"
    return Condition(field, op, tuple(value for value in values if value is not None))
