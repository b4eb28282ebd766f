"""A topic's rows as of one number of the log, page by page, however long the client takes to read them.

No transaction stays open: a client that reads slowly would hold up the database's clean-up for everybody. Each page is
read as the table is then, with the number that it shows, and what happened since the snapshot's own number is taken
back with the help of the log, which holds what every row was before. So all pages show one state, and the events
after it follow exactly.

The rows are walked in order of their ids. `_undo` says what rows not yet sent were as of the snapshot; it grows only
with what changes while the snapshot is read, and has a bound.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from core import metrics
from core.errors import Unavailable
from core.filters import Filter, Row
from realtime.fanout.changes import changes_of, compiled
from realtime.feed.feed import Feed
from realtime.wire import frames
from realtime.wire.frames import Rendering
from repository.engine.database import Database
from repository.engine.events import Event
from repository.generic import snapshots
from repository.generic.snapshots import Beginning

PAGE_ROWS = 500
FIRST_PAGE_ROWS = 100  # until it is known how large rows are
MAX_PAGE_BYTES = 512 * 1024
MAX_UNDO_ROWS = 20_000
MAX_UNDO_BYTES = 16 * 1024 * 1024
MAX_CONCURRENT_PAGE_READS = 2

Id = int | str


BEGIN_ATTEMPTS = 40
BEGIN_PAUSE_SECONDS = 0.05


class SnapshotLost(Exception):
    """The log was replaced, or too much changed while the snapshot was read: start over."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of a topic a snapshot shows. `owner_id` is whose rows of a private topic."""

    topics: tuple[str, ...]
    filters: Mapping[str, Filter]
    rendering: Rendering
    audiences: frozenset[str]
    owner_id: int | None


class Snapshots:
    """One per process: what reading snapshots needs, and how many read at once."""

    def __init__(self, database: Database, feed: Feed) -> None:
        self.database = database
        self.feed = feed
        self._reading = asyncio.Semaphore(MAX_CONCURRENT_PAGE_READS)

    async def begin(self, topics: Sequence[str]) -> Beginning:
        """Where a snapshot begins; this worker's stream has come as far. Raises Unavailable."""
        for _ in range(BEGIN_ATTEMPTS):
            found = await snapshots.beginning(self.database, topics)
            if found.head.epoch == self.feed.head.epoch:
                await self.feed.reach(found.head.seq)
                if found.head.epoch == self.feed.head.epoch:
                    return found
            # Another log, which the feed is about to notice.
            self.feed.look()
            await asyncio.sleep(BEGIN_PAUSE_SECONDS)
        raise Unavailable("The log is being replaced")

    async def read(
        self, topic: str, wanted: Wanted, after: Id | None, until: int | None, max_rows: int
    ) -> snapshots.SnapshotPage:
        async with self._reading:
            return await snapshots.read_page(
                self.database,
                topic,
                wanted.filters.get(topic, Filter()),
                owner_id=wanted.owner_id,
                after=after,
                until=until,
                max_rows=max_rows,
            )


class Snapshot:
    """The frames of one snapshot, of one topic after the other."""

    def __init__(self, source: Snapshots, wanted: Wanted, beginning: Beginning) -> None:
        self._topics = [_TopicSnapshot(source, wanted, topic, beginning) for topic in wanted.topics]

    @property
    def is_done(self) -> bool:
        return not self._topics

    async def next_page(self) -> list[bytes]:
        """Raises SnapshotLost and PositionTooOld: all that was sent is void. Raises Unavailable: ask again."""
        topic = self._topics[0]
        texts = await topic.next_page()
        if topic.is_done:
            del self._topics[0]
        return texts


class _TopicSnapshot:
    def __init__(self, source: Snapshots, wanted: Wanted, topic: str, beginning: Beginning) -> None:
        start = beginning.head
        self.is_done = False
        self._source = source
        self._wanted = wanted
        self._topic = topic
        self._start = start
        self._seen = start.seq  # the number up to which the log was searched for what to take back
        self._after: Id | None = None
        self._until = beginning.highest[topic]  # no row above it is part of the snapshot
        self._undo: dict[Id, Row | None] = {}
        self._undo_bytes = 0
        self._rows = FIRST_PAGE_ROWS
        test = wanted.filters.get(topic)
        self._test = compiled(test) if test is not None else lambda _: True

    async def next_page(self) -> list[bytes]:
        page = await self._source.read(self._topic, self._wanted, self._after, self._until, self._rows)
        if page.head.epoch != self._start.epoch or page.head.seq < self._start.seq:
            raise SnapshotLost
        await self._look_back(page.head.seq)
        last = None if page.is_last else page.rows[-1]["id"]
        rows = as_of(page.rows, self._undo, last, self._test)
        if last is None:
            self.is_done = True
        else:
            self._after = last
            self._undo = {key: row for key, row in self._undo.items() if key > last}
        metrics.SNAPSHOT_ROWS.inc(len(rows))
        return self._texts(rows)

    async def _look_back(self, seq: int) -> None:
        """Learn from the log what changed up to `seq`."""
        feed = self._source.feed
        await feed.reach(seq)
        while self._seen < seq:
            if feed.head.epoch != self._start.epoch:
                raise SnapshotLost
            events = await feed.read_after(self._seen)
            if not events:
                await feed.reach(seq)
                continue
            for event in events:
                if event.seq <= seq:
                    self._take_back(event)
                    self._seen = event.seq
            if len(self._undo) > MAX_UNDO_ROWS or self._undo_bytes > MAX_UNDO_BYTES:
                raise SnapshotLost
            await asyncio.sleep(0)

    def _take_back(self, event: Event) -> None:
        if event.topic != self._topic or event.audience not in self._wanted.audiences:
            return
        changes = changes_of(event)
        for change in changes:
            key = change.id
            # Rows already sent were right, and those above the highest came later.
            is_ahead = self._after is None or key > self._after  # type: ignore[operator]
            is_new = self._until is not None and key > self._until  # type: ignore[operator]
            if is_ahead and not is_new and key not in self._undo:
                self._undo[key] = change.before
                self._undo_bytes += len(event.before or b"") // len(changes)

    def _texts(self, rows: Sequence[Row]) -> list[bytes]:
        encoded = [orjson.dumps(row) for row in rows]
        if encoded:
            mean = sum(map(len, encoded)) // len(encoded)
            self._rows = max(1, min(PAGE_ROWS, MAX_PAGE_BYTES // mean))
        parts = _parts(encoded)
        last = len(parts) - 1
        return [
            frames.snapshot_page(
                self._topic, self._wanted.rendering, self._start.seq, part, done=self.is_done and number == last
            )
            for number, part in enumerate(parts)
            if part or self.is_done
        ]


def as_of(found: Sequence[Row], undo: Mapping[Id, Row | None], last: Id | None, test: Any) -> list[Row]:
    """The rows of a page as they were before what `undo` takes back. The page ends with the id `last`, None when
    nothing comes after it. Pure.
    """
    rows: dict[Id, Row] = {row["id"]: row for row in found}
    for key, row in undo.items():
        if last is not None and key > last:  # type: ignore[operator]
            continue
        if row is not None and test(row):
            rows[key] = row
        else:
            rows.pop(key, None)
    return [rows[key] for key in sorted(rows)]


def _parts(items: Sequence[bytes]) -> list[list[bytes]]:
    parts: list[list[bytes]] = [[]]
    size = 0
    for item in items:
        if parts[-1] and size + len(item) > MAX_PAGE_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(item)
        size += len(item) + 1
    return parts
