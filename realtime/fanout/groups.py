"""The live subscriptions that receive every event, in groups with equal specs, and the index of their filters."""

from __future__ import annotations

from collections.abc import Iterator

from core.filters import Filter
from realtime.fanout.changes import Change, FilteredChange
from realtime.fanout.costs import Budget
from realtime.fanout.matching import FilterIndex
from realtime.fanout.spec import Spec
from realtime.fanout.subscription import Subscription
from repository.engine.events import Event


class Groups:
    """A group exists as long as it has members. Subscriptions may be discarded while one of the iterators is in use."""

    def __init__(self) -> None:
        self.plain: dict[Spec, set[Subscription]] = {}
        self.filtered: dict[Spec, set[Subscription]] = {}
        self._by_filter: dict[tuple[str, Filter], set[Spec]] = {}
        self._indexes: dict[str, FilterIndex] = {}

    def __len__(self) -> int:
        """Return the number of subscriptions."""
        return sum(map(len, (*self.plain.values(), *self.filtered.values())))

    def __bool__(self) -> bool:
        return bool(self.plain or self.filtered)

    def __contains__(self, subscription: Subscription) -> bool:
        return subscription in self._groups_for(subscription.spec).get(subscription.spec, ())

    def specs(self) -> list[Spec]:
        return [*self.plain, *self.filtered]

    def members(self, spec: Spec) -> set[Subscription]:
        """Return a copy of a group, which is empty if the group no longer exists."""
        return set(self._groups_for(spec).get(spec, ()))

    def add(self, subscription: Subscription) -> None:
        spec = subscription.spec
        groups = self._groups_for(spec)
        if spec not in groups:
            groups[spec] = set()
            self._index(spec)
        groups[spec].add(subscription)

    def discard(self, subscription: Subscription) -> None:
        spec = subscription.spec
        groups = self._groups_for(spec)
        group = groups[spec]
        group.discard(subscription)
        if not group:
            del groups[spec]
            self._unindex(spec)

    def _groups_for(self, spec: Spec) -> dict[Spec, set[Subscription]]:
        return self.filtered if spec.filters else self.plain

    def has_filters(self, topic: str) -> bool:
        return topic in self._indexes

    def affected_filters(
        self, event: Event, changes: list[Change], budget: Budget
    ) -> Iterator[tuple[Filter, list[FilteredChange] | None, list[Spec]]]:
        """Yield each filter that the event affects, with the changes as the filter sees them (None if the filter
        exceeds the budget) and the specs with the filter.
        """
        size = len(event.payload) + len(event.before or b"")
        for wanted, filtered in self._indexes[event.topic].affected_filters(changes, size, budget):
            yield wanted, filtered, list(self._by_filter.get((event.topic, wanted), ()))

    def _index(self, spec: Spec) -> None:
        for topic, wanted in spec.filters:
            specs = self._by_filter.setdefault((topic, wanted), set())
            if not specs:
                self._indexes.setdefault(topic, FilterIndex()).add(wanted)
            specs.add(spec)

    def _unindex(self, spec: Spec) -> None:
        for topic, wanted in spec.filters:
            specs = self._by_filter[topic, wanted]
            specs.discard(spec)
            if not specs:
                del self._by_filter[topic, wanted]
                self._indexes[topic].discard(wanted)
                if not self._indexes[topic]:
                    del self._indexes[topic]
