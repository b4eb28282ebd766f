"""Which filters an event is about, without asking each of them. Pure.

A filter that asks for equality of some field is found by the value that a row has there; only filters without any such
condition are asked one by one. So a thousand dashboards, each with its own `movie_id`, cost an event as much as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from filters import Condition, Filter, Kind, Op, Row
from realtime.changes import Change, Seen, compiled, see

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


@dataclass(slots=True)
class FilterIndex:
    """The filters on one topic."""

    _by_value: dict[str, dict[Any, set[Filter]]] = field(default_factory=dict)
    _lists: set[str] = field(default_factory=set)  # of those columns, the ones that hold several values
    _others: set[Filter] = field(default_factory=set)

    def add(self, wanted: Filter) -> None:
        key = key_of(wanted)
        if key is None:
            self._others.add(wanted)
            return
        if key.field.kind is Kind.STRINGS:
            self._lists.add(key.field.column)
        values = self._by_value.setdefault(key.field.column, {})
        for value in _values(key):
            values.setdefault(value, set()).add(wanted)

    def discard(self, wanted: Filter) -> None:
        key = key_of(wanted)
        if key is None:
            self._others.discard(wanted)
            return
        values = self._by_value.get(key.field.column, {})
        for value in _values(key):
            found = values.get(value, set())
            found.discard(wanted)
            if not found:
                values.pop(value, None)
        if not values:
            self._by_value.pop(key.field.column, None)

    def __bool__(self) -> bool:
        return bool(self._others or self._by_value)

    def _found_by(self, row: Row) -> Iterator[Filter]:
        for column, values in self._by_value.items():
            held = row.get(column)
            for value in held if column in self._lists and held is not None else (held,):
                yield from values.get(value, ())

    def judge(self, changes: Sequence[Change]) -> Iterator[tuple[Filter, list[Seen]]]:
        """Each filter that the changes are about, with what it sees of them."""
        candidates: dict[Filter, list[Change]] = {wanted: list(changes) for wanted in self._others}
        if self._by_value:
            for change in changes:
                for wanted in {wanted for row in change.rows for wanted in self._found_by(row)}:
                    candidates.setdefault(wanted, []).append(change)
        for wanted, possible in candidates.items():
            seen = see(compiled(wanted), possible)
            if seen:
                yield wanted, seen
