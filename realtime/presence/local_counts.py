"""The presence counts of this worker, and which of them are stored for the other workers. Pure.

There is one count for each topic and user; all anonymous clients together count as one user. A count includes the open
sockets and the lingering sockets, which ended a moment ago and whose clients may reconnect.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from repository.presence import Row

STEP_SECONDS = 0.25  # sockets that stop lingering within the same step are recorded together

Place = tuple[str, int]  # topic and user id


@dataclass(slots=True)
class _Count:
    username: str | None
    connections: int = 0
    lingering: int = 0
    # The times at which sockets stop lingering, and how many sockets stop at each time.
    ends: deque[tuple[float, int]] = field(default_factory=deque)


class LocalCounts:
    """The counts of one worker. `changed` names the counts whose stored rows may be out of date, in order of change."""

    def __init__(self, linger_seconds: float) -> None:
        self.changed: dict[Place, None] = {}
        self._linger_seconds = linger_seconds
        self._by_topic: dict[str, dict[int, _Count]] = {}
        self._ends: deque[tuple[float, Place]] = deque()
        self._stored: set[Place] = set()

    @property
    def is_stored(self) -> bool:
        """Whether the database may hold any row of this worker."""
        return bool(self._stored)

    @property
    def next_end(self) -> float:
        """The time at which the next socket stops lingering; infinity when none lingers."""
        return self._ends[0][0] if self._ends else math.inf

    def enter(self, topic: str, user_id: int, username: str | None) -> None:
        count = self._by_topic.setdefault(topic, {}).setdefault(user_id, _Count(username))
        count.connections += 1
        count.username = username
        self.changed[topic, user_id] = None

    def leave(self, topic: str, user_id: int, now: float, *, lingers: bool) -> None:
        count = self._by_topic[topic][user_id]
        assert count.connections > 0, (topic, user_id)
        count.connections -= 1
        if lingers:
            count.lingering += 1
            end = math.ceil((now + self._linger_seconds) / STEP_SECONDS) * STEP_SECONDS
            if count.ends and count.ends[-1][0] == end:
                count.ends[-1] = end, count.ends[-1][1] + 1
            else:
                count.ends.append((end, 1))
                self._ends.append((end, (topic, user_id)))
        self._note_change(topic, user_id, count)

    def end_lingering(self, now: float) -> None:
        """Stop counting the sockets that have stopped lingering by `now`."""
        while self._ends and self._ends[0][0] <= now:
            _, (topic, user_id) = self._ends.popleft()
            count = self._by_topic[topic][user_id]
            count.lingering -= count.ends.popleft()[1]
            self._note_change(topic, user_id, count)

    def _note_change(self, topic: str, user_id: int, count: _Count) -> None:
        self.changed[topic, user_id] = None
        if not count.connections and not count.lingering:
            del self._by_topic[topic][user_id]

    def rows(self, topic: str) -> Iterable[Row]:
        for user_id, count in self._by_topic.get(topic, {}).items():
            yield Row(topic, user_id, count.username, count.connections, count.lingering)

    def _row(self, place: Place) -> Row:
        topic, user_id = place
        count = self._by_topic.get(topic, {}).get(user_id)
        if count is None:
            return Row(topic, user_id, None, 0, 0)
        return Row(topic, user_id, count.username, count.connections, count.lingering)

    # --- storing: `begin_storing`, then `end_storing`, or `mark_all_changed` if the write may have failed

    def begin_storing(self, places: Sequence[Place]) -> list[Row]:
        """Return the rows to write for `places`, and remove `places` from `changed`."""
        rows = []
        for place in places:
            del self.changed[place]
            row = self._row(place)
            if not row.is_empty:
                self._stored.add(place)
            elif place not in self._stored:
                continue  # every socket of this count has come and gone since the last write
            rows.append(row)
        return rows

    def end_storing(self, rows: Iterable[Row]) -> None:
        self._stored.difference_update((row.topic, row.user_id) for row in rows if row.is_empty)

    def mark_all_changed(self) -> None:
        """Mark every count as changed, because it is not known which rows are stored."""
        self.changed |= dict.fromkeys(self._stored)
        places = ((topic, user_id) for topic, counts in self._by_topic.items() for user_id in counts)
        self.changed |= dict.fromkeys(places)
