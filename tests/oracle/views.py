"""Apply the frames of one subscription, strictly and without I/O.

A view begins with a snapshot, or with rows as of a known sequence number, and applies every frame of its subscription.
A frame that a correct stream cannot contain raises `Wrong`: an `add` of an existing row, an `update` or `delete` of a
missing one, a sequence number that does not increase, an event within a snapshot, an unexpected `resync`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Rows = dict[str, dict[Any, Row]]  # rows by topic and id

REMEMBERED = 60  # the last frames of a view, shown when a play fails


class Wrong(AssertionError):
    """The service sent a frame that a correct stream cannot contain."""


@dataclass(frozen=True)
class Place:
    epoch: str
    seq: int


class View:
    """The rows of one subscription. `position` is that of the last applied event, None until the rows are complete."""

    def __init__(self, topics: Sequence[str], wanted: Mapping[str, Any] | None, latest_every_ms: int | None) -> None:
        self.topics = tuple(topics)
        self.wanted = wanted
        self.latest_every_ms = latest_every_ms
        self.rows: Rows = {topic: {} for topic in topics}
        self.position: Place | None = None
        self.told: deque[str] = deque(maxlen=REMEMBERED)
        self._start: Place | None = None
        self._missing: set[str] = set()  # topics whose snapshot has not ended
        self._group: list[Row] = []
        self._is_refused = False  # whether the position in the request was invalid on purpose
        self._is_void = False
        self._begins_later = False  # whether the snapshot may have a higher number than the resync before it

    def __repr__(self) -> str:
        return f"View(topics={self.topics}, filter={self.wanted}, latest_every_ms={self.latest_every_ms})"

    def begin_with(self, rows: Rows, place: Place) -> None:
        """Start with the rows as of a known position."""
        self.rows = {topic: dict(rows[topic]) for topic in self.topics}
        self.position = place
        self.told.append(f"begins at {place.seq} with { ({t: len(r) for t, r in self.rows.items()}) }")

    # --- the connection

    def subscribed(self, epoch: str, seq: int, *, since: int | None, snapshot: bool, is_bad: bool = False) -> None:
        """Apply the reply to `subscribe`, or the welcome of a default subscription."""
        self._group.clear()
        self._is_void = False
        self.told.append(f"subscribed at {seq}, since {since}, snapshot {snapshot}, bad position {is_bad}")
        self._is_refused = is_bad
        if since is not None and not is_bad:
            if seq != since:
                raise Wrong(f"expected to resume at {since}, got {seq}: {self}")
        elif snapshot and not is_bad:
            self._begin_snapshot(Place(epoch, seq))

    def cut(self) -> None:
        """Discard an incomplete event or snapshot, because the connection ended."""
        self.told.append("cut")
        self._group.clear()
        if self._missing:
            self._missing.clear()
            self.position = None

    def _begin_snapshot(self, place: Place) -> None:
        self.position, self._start, self._begins_later = None, place, False
        self._missing = set(self.topics)
        self._group.clear()
        self.rows = {topic: {} for topic in self.topics}

    @property
    def is_whole(self) -> bool:
        return self.position is not None and not self._group

    # --- frames

    def take(self, frame: Row, *, snapshot: bool) -> bool:
        """Apply a frame. Return False after a resync if no snapshot follows it, because `snapshot` is False."""
        operation = frame["operation"]
        if self._is_void:
            return True
        if operation == "resync":
            return self._resync(frame["data"], snapshot=snapshot)
        if self._is_refused:
            raise Wrong(f"expected a resync, got {_brief(frame)}: {self}")
        if operation == "snapshot":
            self._take_rows(frame)
        elif operation != "progress":
            self._take_event(frame)
        return True

    def _resync(self, data: Row, *, snapshot: bool) -> bool:
        self.told.append(f"resync {data}")
        if not self._is_refused and not self._missing:
            raise Wrong(f"a valid position was rejected with {data}: {self}")
        self._is_refused = False
        self._begin_snapshot(Place(data["epoch"], data["seq"]))
        self._is_void = not snapshot
        self._begins_later = True
        return snapshot

    def _take_rows(self, frame: Row) -> None:
        topic, data = frame["topic"], frame["data"]
        self.told.append(f"{topic} snapshot {frame['seq']} of {[row['id'] for row in data['items']]}, {data['done']=}")
        if topic not in self._missing or self._start is None:
            raise Wrong(f"unexpected snapshot page of {topic}: {self}")
        if self._begins_later and frame["seq"] > self._start.seq:
            self._start = Place(self._start.epoch, frame["seq"])
        self._begins_later = False
        if frame["seq"] != self._start.seq:
            raise Wrong(f"expected a snapshot page as of {self._start.seq}, got one as of {frame['seq']}: {self}")
        for row in data["items"]:
            if row["id"] in self.rows[topic]:
                raise Wrong(f"{topic} {row['id']} occurs twice in one snapshot: {self}")
            self.rows[topic][row["id"]] = row
        if data["done"]:
            self._missing.discard(topic)
            if not self._missing:
                self.position = self._start

    def _take_event(self, frame: Row) -> None:
        self.told.append(_brief(frame))
        if self.position is None:
            raise Wrong(f"expected the rest of the snapshot, got {_brief(frame)}: {self}")
        if frame["topic"] not in self.topics:
            raise Wrong(f"expected an event of {self.topics}, got {_brief(frame)}: {self}")
        if frame["seq"] <= self.position.seq:
            raise Wrong(f"expected a number above {self.position.seq}, got {_brief(frame)}: {self}")
        if self._group and self._group[0]["seq"] != frame["seq"]:
            raise Wrong(f"expected the rest of event {self._group[0]['seq']}, got {_brief(frame)}: {self}")
        self._group.append(frame)
        if not frame.get("more"):
            for each in self._group:
                self._apply(each)
            self._group.clear()
            self.position = Place(self.position.epoch, frame["seq"])

    def _apply(self, frame: Row) -> None:
        rows, data = self.rows[frame["topic"]], frame["data"]
        operation = frame["operation"].removesuffix("_bulk")
        is_bulk = operation != frame["operation"]
        if operation == "delete":
            for id_ in data["ids"] if is_bulk else [data["id"]]:
                if id_ not in rows:
                    raise Wrong(f"{id_} was not in the view: {_brief(frame)}: {self}")
                del rows[id_]
            return
        for row in data["items"] if is_bulk else [data]:
            if (row["id"] in rows) != (operation == "update"):
                there = "was already in the view" if row["id"] in rows else "was not in the view"
                raise Wrong(f"{row['id']} {there}: {_brief(frame)}: {self}")
            if operation == "update" and "version" in row:
                self._compare(rows[row["id"]], row, frame)
            rows[row["id"]] = row

    def _compare(self, old: Row, new: Row, frame: Row) -> None:
        """Raise Wrong unless an update changes exactly the fields that it names and does not lower the version."""
        named = set(frame["changed"])
        changed = {name for name in new if new[name] != old[name]} - {"version", "updated_at"}
        has_intervals = self.latest_every_ms is not None  # a change and its reversal in one interval cancel out
        if new["version"] < old["version"] or not changed <= named or not (changed or has_intervals):
            raise Wrong(f"expected changes of {named}, got {changed or 'none'}: {_brief(frame)}: {self}")

    # --- comparison

    def difference(self, truth: Rows) -> str | None:
        """Return how the view differs from the truth, or None if it does not."""
        if not self.is_whole:
            return f"not complete: {self._missing or self._group or 'nothing received'}"
        for topic in self.topics:
            seen, real = self.rows[topic], truth[topic]
            if seen == real:
                continue
            missing, extra = sorted(real.keys() - seen.keys()), sorted(seen.keys() - real.keys())
            parts = [f"{topic}: missing {missing[:10]} of {len(real)}, unexpected {extra[:10]}"]
            unequal = [id_ for id_ in real.keys() & seen.keys() if real[id_] != seen[id_]]
            if unequal:
                id_ = min(unequal)
                parts.append(
                    f"{len(unequal)} unequal, first\n  expected {str(real[id_])[:700]}\n  got {str(seen[id_])[:700]}"
                )
            return "; ".join(parts)
        return None


def _brief(frame: Row) -> str:
    data = frame["data"]
    ids = data.get("ids") or [row["id"] for row in data.get("items", [data])]
    more = " more" if frame.get("more") else ""
    reason = f" by {frame['reason']}" if "reason" in frame else ""
    return f"{frame['seq']} {frame['operation']} {frame['topic']} {ids}{reason}{more}"
