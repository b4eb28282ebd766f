"""Snapshots and windows of the chaos run, against the rows that the log builds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tests.chaos_judge import Entry, Frame, Log, Row, Wish


class Replay:
    """The rows of a wish at ever higher numbers."""

    def __init__(self, log: Log, wish: Wish) -> None:
        (topic,) = wish.topics
        self.rows: dict[int, Row] = {}
        self._wish = wish
        self._entries = [entry for entry in log.entries if entry.frame["topic"] == topic]
        self._next = 0

    def advance(self, seq: int) -> set[int]:
        """Go on to `seq`. Answers which ids were touched."""
        touched: set[int] = set()
        for entry in self._until(seq):
            for id_ in entry.before.keys() | entry.after.keys():
                touched.add(id_)
                row = entry.after.get(id_)
                if row is not None and self._wish.matches(row):
                    self.rows[id_] = row
                else:
                    self.rows.pop(id_, None)
        return touched

    def _until(self, seq: int) -> Iterator[Entry]:
        while self._next < len(self._entries) and self._entries[self._next].seq <= seq:
            yield self._entries[self._next]
            self._next += 1


def wrong_snapshot(log: Log, wish: Wish, seq: int, items: Sequence[Row]) -> str | None:
    """What is wrong with a snapshot as of `seq`, if anything."""
    replay = Replay(log, wish)
    replay.advance(seq)
    got = {row["id"]: row for row in items}
    if len(got) != len(items):
        return f"snapshot at {seq}: {len(items) - len(got)} rows came twice"
    wrong = [id_ for id_ in sorted(got.keys() | replay.rows.keys()) if got.get(id_) != replay.rows.get(id_)]
    if wrong:
        first = f"{wrong[0]}: expected {replay.rows.get(wrong[0])}, got {got.get(wrong[0])}"
        return f"snapshot at {seq}: {len(wrong)} of {len(replay.rows)} rows differ, first {first}"
    return None


def wrong_window(log: Log, wish: Wish, start: int, got: Sequence[Frame]) -> str | None:
    """The first window after which a view was not what the log says at the window's number, if any.

    The view is what a client keeps: it begins as the rows at `start`.
    """
    replay = Replay(log, wish)
    replay.advance(start)
    view = dict(replay.rows)
    doubtful: set[int] = set()
    last = start
    for frame in got:
        if frame["seq"] < last:
            return f"window {frame['seq']} after {last}"
        last = frame["seq"]
        problem = _apply(frame, view, doubtful)
        if problem is not None:
            return f"window {last}: {problem}"
        if frame.get("more"):
            continue
        doubtful |= replay.advance(last)
        wrong = [id_ for id_ in sorted(doubtful) if view.get(id_) != replay.rows.get(id_)]
        if wrong:
            first = f"{wrong[0]}: expected {replay.rows.get(wrong[0])}, got {view.get(wrong[0])}"
            return f"after window {last}: {len(wrong)} rows differ, first {first}"
        doubtful.clear()
    doubtful = replay.advance(log.head)
    wrong = [id_ for id_ in sorted(doubtful) if view.get(id_) != replay.rows.get(id_)]
    return f"in the end {len(wrong)} rows differ: {wrong[:5]}" if wrong else None


def _apply(frame: Frame, view: dict[int, Row], touched: set[int]) -> str | None:
    data = frame["data"]
    operation = frame["operation"].removesuffix("_bulk")
    if operation == "delete":
        for id_ in data.get("ids", [data.get("id")]):
            touched.add(id_)
            if view.pop(id_, None) is None:
                return f"delete of {id_}, which was not in view"
        return None
    for row in data.get("items", [data]):
        if (row["id"] in view) != (operation == "update"):
            return f"{operation} of {row['id']}, which was {'' if row['id'] in view else 'not '}in view"
        touched.add(row["id"])
        view[row["id"]] = row
    return None
