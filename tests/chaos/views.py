"""Compare the snapshots and `latest_every_ms` intervals that clients received with the rows rebuilt from the log."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tests.chaos.judge import Entry, Frame, Log, Row, Wish, mark_of


@dataclass(frozen=True)
class Marks:
    """The rows of a snapshot: their ids, and a digest of each."""

    ids: array[int] = field(default_factory=lambda: array("q"))
    marks: array[int] = field(default_factory=lambda: array("Q"))

    def extend(self, rows: Sequence[Row]) -> None:
        self.ids.extend(row["id"] for row in rows)
        self.marks.extend(map(mark_of, rows))


def marked(frame: Frame) -> Frame:
    """Return a frame of an interval with each row replaced by its digest."""
    kept = {name: frame[name] for name in ("operation", "seq", "more") if name in frame}
    data = frame["data"]
    if frame["operation"].startswith("delete"):
        return kept | {"ids": data.get("ids", [data.get("id")])}
    return kept | {"marks": [(row["id"], mark_of(row)) for row in data.get("items", [data])]}


class Replay:
    """The rows of a subscription, as digests by id, as of the last `seq` that `advance` was called with."""

    def __init__(self, log: Log, wish: Wish) -> None:
        (topic,) = wish.topics
        self.rows: dict[int, int] = {}
        self._log = log
        self._wish = wish
        self._entries = [entry for entry in log.entries if entry.frame["topic"] == topic]
        self._next = 0

    def advance(self, seq: int) -> set[int]:
        """Replay the log up to `seq`, and return the ids of the rows that its events touched."""
        touched: set[int] = set()
        for entry in self._until(seq):
            for id_ in entry.before.keys() | entry.after.keys():
                touched.add(id_)
                row = entry.after.get(id_)
                if row is not None and self._wish.matches(row):
                    self.rows[id_] = self._log.mark_of(row)
                else:
                    self.rows.pop(id_, None)
        return touched

    def _until(self, seq: int) -> Iterator[Entry]:
        while self._next < len(self._entries) and self._entries[self._next].seq <= seq:
            yield self._entries[self._next]
            self._next += 1

    def wrong(self, got: Mapping[int, int], ids: Iterable[int]) -> list[str]:
        """Return a message for each of these ids whose row in `got` is not the expected one."""
        return [
            f"{id_}: expected {'a row' if id_ in self.rows else 'none'}, got {'a wrong one' if id_ in got else 'none'}"
            for id_ in sorted(ids)
            if got.get(id_) != self.rows.get(id_)
        ]


def wrong_snapshot(log: Log, wish: Wish, seq: int, items: Marks) -> str | None:
    """Return what is wrong with a snapshot as of `seq`, or None."""
    replay = Replay(log, wish)
    replay.advance(seq)
    got = dict(zip(items.ids, items.marks, strict=True))
    if len(got) != len(items.ids):
        return f"snapshot at {seq}: {len(items.ids) - len(got)} rows came twice"
    wrong = replay.wrong(got, got.keys() | replay.rows.keys())
    return f"snapshot at {seq}: {len(wrong)} of {len(replay.rows)} rows differ, first {wrong[0]}" if wrong else None


def wrong_interval(log: Log, wish: Wish, start: int, got: Sequence[Frame]) -> str | None:
    """Return a message about the first interval after which a client's rows differ from those of the log, or None.

    The client starts with the rows as of `start`. `got` holds frames as `marked` returns them.
    """
    replay = Replay(log, wish)
    replay.advance(start)
    view = dict(replay.rows)
    doubtful: set[int] = set()
    last = start
    for frame in got:
        if frame["seq"] < last:
            return f"interval {frame['seq']} after {last}"
        last = frame["seq"]
        problem = _apply(frame, view, doubtful)
        if problem is not None:
            return f"interval {last}: {problem}"
        if frame.get("more"):
            continue
        doubtful |= replay.advance(last)
        wrong = replay.wrong(view, doubtful)
        if wrong:
            return f"after interval {last}: {len(wrong)} rows differ, first {wrong[0]}"
        doubtful.clear()
    wrong = replay.wrong(view, replay.advance(log.head))
    return f"at the end of the log: {len(wrong)} rows differ, first {wrong[0]}" if wrong else None


def _apply(frame: Frame, view: dict[int, int], touched: set[int]) -> str | None:
    operation = frame["operation"].removesuffix("_bulk")
    for id_ in frame.get("ids", ()):
        touched.add(id_)
        if view.pop(id_, None) is None:
            return f"delete of {id_}, which was not in the view"
    for id_, mark in frame.get("marks", ()):
        if (id_ in view) != (operation == "update"):
            return f"{operation} of {id_}, which was {'' if id_ in view else 'not '}in the view"
        touched.add(id_)
        view[id_] = mark
    return None
