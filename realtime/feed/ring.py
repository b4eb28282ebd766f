"""The newest events in memory, so that reconnecting clients cost the database nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import islice

from repository.engine.events import Event

RING_BYTES = 16 * 1024 * 1024
RING_EVENTS = 20_000


class Ring:
    """Contiguous events. Beyond `max_bytes` or `max_events`, the oldest are dropped, but the newest is always kept."""

    def __init__(self, max_bytes: int = RING_BYTES, max_events: int = RING_EVENTS) -> None:
        self._events: deque[Event] = deque()
        self._bytes = 0
        self._max_bytes = max_bytes
        self._max_events = max_events

    def append(self, event: Event) -> None:
        self._events.append(event)
        self._bytes += event.size
        while len(self._events) > 1 and (self._bytes > self._max_bytes or len(self._events) > self._max_events):
            self._bytes -= self._events.popleft().size

    def clear(self) -> None:
        self._events.clear()
        self._bytes = 0

    def at(self, seq: int) -> Event | None:
        """Return the event with this number, or None when it is not in the ring."""
        index = seq - self._events[0].seq if self._events else -1
        return self._events[index] if 0 <= index < len(self._events) else None

    def after(self, seq: int, *, max_events: int, max_bytes: int) -> list[Event] | None:
        """Return the next events after `seq` within `max_events` and `max_bytes`, but at least one if there is any.

        Return None when the ring does not reach back that far.
        """
        if not self._events or seq + 1 < self._events[0].seq:
            return None
        start = seq + 1 - self._events[0].seq
        found: list[Event] = []
        size = 0
        remaining = max(0, len(self._events) - start)
        # A deque can be iterated only from its ends, so for a reader near the head, iterate from the right end.
        if remaining < start:
            events: Iterable[Event] = reversed(list(islice(reversed(self._events), remaining)))
        else:
            events = islice(self._events, start, start + max_events)
        for event in islice(events, max_events):
            size += len(event.payload)
            if found and size > max_bytes:
                break
            found.append(event)
        return found
