"""Finds the filters that an event affects, without evaluating all of them. Pure.

A filter with an equality condition is looked up by the row's value in that field; only filters without such a condition
are evaluated for every row. A thousand dashboards, each with its own `movie_id`, thus do not make an event more
expensive.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.filters import Condition, FieldType, Filter, Matcher, Op, Row, matcher_of
from realtime.fanout.changes import Change, FilteredChange, filter_changes
from realtime.fanout.costs import NO_LOAD, Budget, Load, load_of
from resources.registry import RESOURCES

# The most selective fields come first: the fewer rows share a value, the better the index.
_PARENTS = (parent.column for each in RESOURCES for parent in each.parents)
_LABELS = (each.label for each in RESOURCES if each.label)
_MOST_SELECTIVE = tuple(dict.fromkeys(("id", *_PARENTS, "user_id", *_LABELS)))


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
    load: Load


@dataclass(slots=True)
class FilterIndex:
    """The distinct filters on one topic, indexed by the values that they require."""

    _entries: dict[Filter, _Entry] = field(default_factory=dict)
    _by_value: dict[str, dict[Any, set[_Entry]]] = field(default_factory=dict)
    _lists: set[str] = field(default_factory=set)  # the indexed columns that hold lists of values
    _unindexed: set[_Entry] = field(default_factory=set)
    _unindexed_load: Load = NO_LOAD

    def add(self, wanted: Filter) -> None:
        if wanted in self._entries:
            return
        entry = self._entries[wanted] = _Entry(wanted, matcher_of(wanted), load_of(wanted))
        key = key_of(wanted)
        if key is None:
            self._unindexed.add(entry)
            self._unindexed_load += entry.load
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
            self._unindexed_load -= entry.load
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

    def affected_filters(
        self, changes: Sequence[Change], size: int, budget: Budget
    ) -> Iterator[tuple[Filter, list[FilteredChange] | None]]:
        """Yield each filter that is affected by a change, with the changes as that filter sees them.

        A filter that exceeds the budget is not evaluated and is yielded with None; the cheapest filters are evaluated
        first. `size` is the size of the encoded changes in bytes.
        """
        found: dict[_Entry, list[Change]] = {}
        if self._by_value:
            for change in changes:
                for entry in {entry for row in change.rows for entry in self._indexed_for(row)}:
                    found.setdefault(entry, []).append(change)
        mean = size // max(1, len(changes))
        costs = {entry: entry.load.cost(len(possible), mean * len(possible)) for entry, possible in found.items()}
        candidates: dict[_Entry, Sequence[Change]] = {**dict.fromkeys(self._unindexed, changes), **found}
        fits = budget.take(self._unindexed_load.cost(len(changes), size) + sum(costs.values()))
        if not fits:
            costs |= {entry: entry.load.cost(len(changes), size) for entry in self._unindexed}
            candidates = {entry: candidates[entry] for entry in sorted(candidates, key=costs.__getitem__)}
        for entry, possible in candidates.items():
            if not fits and not budget.take(costs[entry]):
                yield entry.wanted, None
            elif filtered := filter_changes(entry.matches, possible):
                yield entry.wanted, filtered
