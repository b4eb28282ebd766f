"""Finds the filters that an event affects, without evaluating all of them. Pure.

A filter with an equality condition is looked up by the row's value in that field; only filters without such a condition
are evaluated for every row. A thousand dashboards, each with its own `movie_id`, thus do not make an event more
expensive.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.filters import Condition, FieldType, Filter, Matcher, Op, matcher_of
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

    def _indexed(self, changes: Sequence[Change]) -> dict[_Entry, list[list[Change]]]:
        """Return the indexed filters that the changes can affect. Each list holds the changes with one of the values
        that the filter requires, and is shared by all filters that require this value.
        """
        found: dict[_Entry, list[list[Change]]] = {}
        for column, values in self._by_value.items():
            by_value: dict[Any, list[Change]] = {}
            is_list = column in self._lists
            for change in changes:
                held = [row.get(column) for row in change.rows]
                for value in {value for each in held for value in (each or ())} if is_list else set(held):
                    if value in values:
                        by_value.setdefault(value, []).append(change)
            for value, possible in by_value.items():
                for entry in values[value]:
                    found.setdefault(entry, []).append(possible)
        return found

    def affected_filters(
        self, changes: Sequence[Change], size: int, budget: Budget
    ) -> Iterator[tuple[Filter, list[FilteredChange] | None]]:
        """Yield each filter that is affected by a change, with the changes as that filter sees them.

        A filter that exceeds the budget is not evaluated and is yielded with None; the cheapest filters are evaluated
        first. `size` is the size of the encoded changes in bytes.
        """
        found = self._indexed(changes) if self._by_value else {}
        mean = size // max(1, len(changes))
        costs = {}
        for entry, lists in found.items():
            count = min(len(changes), sum(map(len, lists)))
            costs[entry] = entry.load.cost(count, mean * count)
        candidates: Iterable[_Entry] = (*self._unindexed, *found)
        fits = budget.take(self._unindexed_load.cost(len(changes), size) + sum(costs.values()))
        if not fits:
            costs |= {entry: entry.load.cost(len(changes), size) for entry in self._unindexed}
            candidates = sorted(candidates, key=costs.__getitem__)
        for entry in candidates:
            if not fits and not budget.take(costs[entry]):
                yield entry.wanted, None
            elif filtered := filter_changes(entry.matches, _union(changes, found.get(entry))):
                yield entry.wanted, filtered


def _union(changes: Sequence[Change], lists: Sequence[Sequence[Change]] | None) -> Sequence[Change]:
    """Return the changes that are in one of the lists, in their original order; all of them if there are no lists."""
    if lists is None or len(lists) == 1:
        return lists[0] if lists else changes
    wanted = {id(change) for each in lists for change in each}
    return [change for change in changes if id(change) in wanted]
