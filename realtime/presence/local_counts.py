"""This worker's own counts of presence: how many sockets of whom watch what, and what the others know of it. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from repository.presence import Row

STEP_SECONDS = 0.25  # what ends within one step is remembered as one

Place = tuple[str, int]


@dataclass(slots=True)
class _Seat:
    username: str | None
    connections: int = 0
    lingering: int = 0
    # When they cease to linger, and how many.
    ends: deque[tuple[float, int]] = field(default_factory=deque)


class Seats:
    """`changed` are the places whose stored row may differ, in the order in which they changed."""

    def __init__(self, linger_seconds: float) -> None:
        self.changed: dict[Place, None] = {}
        self._linger_seconds = linger_seconds
        self._by_topic: dict[str, dict[int, _Seat]] = {}
        self._ends: deque[tuple[float, Place]] = deque()
        self._stored: set[Place] = set()

    @property
    def is_stored(self) -> bool:
        """Whether any row may be stored."""
        return bool(self._stored)

    @property
    def next_end(self) -> float:
        """When something ceases to linger; infinity when nothing lingers."""
        return self._ends[0][0] if self._ends else math.inf

    def take(self, topic: str, user_id: int, username: str | None) -> None:
        seat = self._by_topic.setdefault(topic, {}).setdefault(user_id, _Seat(username))
        seat.connections += 1
        seat.username = username
        self.changed[topic, user_id] = None

    def give_up(self, topic: str, user_id: int, now: float, *, lingers: bool) -> None:
        seat = self._by_topic[topic][user_id]
        assert seat.connections > 0, (topic, user_id)
        seat.connections -= 1
        if lingers:
            seat.lingering += 1
            end = math.ceil((now + self._linger_seconds) / STEP_SECONDS) * STEP_SECONDS
            if seat.ends and seat.ends[-1][0] == end:
                seat.ends[-1] = end, seat.ends[-1][1] + 1
            else:
                seat.ends.append((end, 1))
                self._ends.append((end, (topic, user_id)))
        self._moved(topic, user_id, seat)

    def end_lingering(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            _, (topic, user_id) = self._ends.popleft()
            seat = self._by_topic[topic][user_id]
            seat.lingering -= seat.ends.popleft()[1]
            self._moved(topic, user_id, seat)

    def _moved(self, topic: str, user_id: int, seat: _Seat) -> None:
        self.changed[topic, user_id] = None
        if not seat.connections and not seat.lingering:
            del self._by_topic[topic][user_id]

    def rows(self, topic: str) -> Iterable[Row]:
        for user_id, seat in self._by_topic.get(topic, {}).items():
            yield Row(topic, user_id, seat.username, seat.connections, seat.lingering)

    def _row(self, place: Place) -> Row:
        topic, user_id = place
        seat = self._by_topic.get(topic, {}).get(user_id)
        if seat is None:
            return Row(topic, user_id, None, 0, 0)
        return Row(topic, user_id, seat.username, seat.connections, seat.lingering)

    # --- storing: `begin_storing`, then `end_storing` when it is certain, or `doubt`

    def begin_storing(self, places: Sequence[Place]) -> list[Row]:
        """The rows to write for these places; they have changed no more."""
        rows = []
        for place in places:
            del self.changed[place]
            row = self._row(place)
            if not row.is_empty:
                self._stored.add(place)
            elif place not in self._stored:
                continue  # came and went unseen
            rows.append(row)
        return rows

    def end_storing(self, rows: Iterable[Row]) -> None:
        self._stored.difference_update((row.topic, row.user_id) for row in rows if row.is_empty)

    def doubt(self) -> None:
        """What is stored is not known: everything has changed."""
        self.changed |= dict.fromkeys(self._stored)
        places = ((topic, user_id) for topic, seats in self._by_topic.items() for user_id in seats)
        self.changed |= dict.fromkeys(places)
