"""Which filters an event affects, without evaluating all of them. Pure.

A filter with an equality condition is found by the value that the row holds in that field; only filters without such a
condition are evaluated one by one. A thousand dashboards, each with its own `movie_id`, thus do not make an event more
expensive.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.filters import Condition, FieldType, Filter, Matcher, Op, Row, matcher_of
from realtime.fanout.changes import Change, FilteredChange, filter_changes
from resources.registry import RESOURCES

# The most selective fields first: the fewer rows share a value, the better the index.
_PARENTS = (parent.column for each in RESOURCES for parent in each.parents)
_MOST_SELECTIVE = tuple(dict.fromkeys(("id", *_PARENTS, "user_id", *(each.label for each in RESOURCES))))


def key_of(wanted: Filter) -> Condition | None:
    """Return the condition by which the filter is indexed, or None when it has to be evaluated for every row."""
    equal = [condition for condition in wanted.all if condition.op in (Op.EQ, Op.IN)]
    if not equal:
        return None
    names = {name: place for place, name in enumerate(_MOST_SELECTIVE)}
    return min(equal, key=lambda condition: (names.get(condition.field.column, len(names)), condition.op is Op.IN))


def _values(condition: Condition) -> tuple[Any, ...]:
    return condition.value if isinstance(condition.value, tuple) else (condition.value,)


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    wanted: Filter
    matches: Matcher


@dataclass(slots=True)
class FilterIndex:
    """The filters on one topic, each once."""

    _entries: dict[Filter, _Entry] = field(default_factory=dict)
    _by_value: dict[str, dict[Any, set[_Entry]]] = field(default_factory=dict)
    _lists: set[str] = field(default_factory=set)  # the indexed columns that hold several values
    _unindexed: set[_Entry] = field(default_factory=set)

    def add(self, wanted: Filter) -> None:
        if wanted in self._entries:
            return
        entry = self._entries[wanted] = _Entry(wanted, matcher_of(wanted))
        key = key_of(wanted)
        if key is None:
            self._unindexed.add(entry)
            return
        if key.field.kind is FieldType.STRINGS:
            self._lists.add(key.field.column)
        values = self._by_value.setdefault(key.field.column, {})
        for value in _values(key):
            values.setdefault(value, set()).add(entry)

    def discard(self, wanted: Filter) -> None:
        entry = self._entries.pop(wanted, None)
        if entry is None:
            return
        key = key_of(wanted)
        if key is None:
            self._unindexed.discard(entry)
            return
        values = self._by_value[key.field.column]
        for value in _values(key):
            values[value].discard(entry)
            if not values[value]:
                del values[value]
        if not values:
            del self._by_value[key.field.column]

    def __bool__(self) -> bool:
        return bool(self._entries)

    def _indexed_for(self, row: Row) -> Iterator[_Entry]:
        for column, values in self._by_value.items():
            held = row.get(column)
            for value in held if column in self._lists and held is not None else (held,):
                yield from values.get(value, ())

    def affected_filters(self, changes: Sequence[Change]) -> Iterator[tuple[Filter, list[FilteredChange]]]:
        """Yield each filter that any change affects, with the changes as that filter sees them."""
        candidates: dict[_Entry, list[Change]] = {entry: list(changes) for entry in self._unindexed}
        if self._by_value:
            for change in changes:
                for entry in {entry for row in change.rows for entry in self._indexed_for(row)}:
                    candidates.setdefault(entry, []).append(change)
        for entry, possible in candidates.items():
            filtered = filter_changes(entry.matches, possible)
            if filtered:
                yield entry.wanted, filtered
