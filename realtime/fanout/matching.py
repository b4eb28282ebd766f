"""Which filters an event is about, without asking each of them. Pure.

A filter that asks for equality of some field is found by the value that a row has there; only filters without any such
condition are asked one by one. So a thousand dashboards, each with its own `movie_id`, cost an event as much as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.filters import Condition, FieldType, Filter, Matcher, Op, Row, matcher_of
from realtime.fanout.changes import Change, Seen, see

# The more rows share a value, the less it tells: ids first.
_TELLING = ("id", "movie_id", "user_id", "title", "name")


def key_of(wanted: Filter) -> Condition | None:
    """The condition by which the filter is found."""
    equal = [condition for condition in wanted.all if condition.op in (Op.EQ, Op.IN)]
    if not equal:
        return None
    names = {name: place for place, name in enumerate(_TELLING)}
    return min(equal, key=lambda condition: (names.get(condition.field.column, len(names)), condition.op is Op.IN))


def _values(condition: Condition) -> tuple[Any, ...]:
    return condition.value if isinstance(condition.value, tuple) else (condition.value,)


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    wanted: Filter
    matches: Matcher


@dataclass(slots=True)
class FilterIndex:
    """The filters on one topic."""

    _known: dict[Filter, _Known] = field(default_factory=dict)
    _by_value: dict[str, dict[Any, set[_Known]]] = field(default_factory=dict)
    _lists: set[str] = field(default_factory=set)  # of those columns, the ones that hold several values
    _others: set[_Known] = field(default_factory=set)

    def add(self, wanted: Filter) -> None:
        if wanted in self._known:
            return
        known = self._known[wanted] = _Known(wanted, matcher_of(wanted))
        key = key_of(wanted)
        if key is None:
            self._others.add(known)
            return
        if key.field.kind is FieldType.STRINGS:
            self._lists.add(key.field.column)
        values = self._by_value.setdefault(key.field.column, {})
        for value in _values(key):
            values.setdefault(value, set()).add(known)

    def discard(self, wanted: Filter) -> None:
        known = self._known.pop(wanted, None)
        if known is None:
            return
        key = key_of(wanted)
        if key is None:
            self._others.discard(known)
            return
        values = self._by_value[key.field.column]
        for value in _values(key):
            values[value].discard(known)
            if not values[value]:
                del values[value]
        if not values:
            del self._by_value[key.field.column]

    def __bool__(self) -> bool:
        return bool(self._known)

    def _found_by(self, row: Row) -> Iterator[_Known]:
        for column, values in self._by_value.items():
            held = row.get(column)
            for value in held if column in self._lists and held is not None else (held,):
                yield from values.get(value, ())

    def judge(self, changes: Sequence[Change]) -> Iterator[tuple[Filter, list[Seen]]]:
        """Each filter that the changes are about, with what it sees of them."""
        candidates: dict[_Known, list[Change]] = {known: list(changes) for known in self._others}
        if self._by_value:
            for change in changes:
                for known in {known for row in change.rows for known in self._found_by(row)}:
                    candidates.setdefault(known, []).append(change)
        for known, possible in candidates.items():
            seen = see(known.matches, possible)
            if seen:
                yield known.wanted, seen
