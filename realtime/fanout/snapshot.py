"""The rows of a topic as of one number of the log, page by page, however long the client takes to read them.

Rules:
- All pages show one state: the rows as of the snapshot's number. The events that follow begin right after that number.
- No transaction stays open between pages, because a slow client's snapshot would then block the database's clean-up. A
  page is read from the table in its current state, together with the log's head. The changes since the snapshot's
  number are then undone with the help of the log, whose events hold the rows as they were before each change.
- Rows are read in order of their ids. `_undo` holds the changed rows that have not been sent yet, as they were before
  the change. `_undo` is bounded, and grows only with the changes made while the snapshot is read. The rows that all
  snapshots of a client hold are bounded together (`core.network.unsent`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core import metrics
from core.errors import Unavailable
from core.filters import Filter, Row
from core.network.unsent import Buffer, UnsentBytes
from realtime.fanout.evaluation import Evaluation
from realtime.feed.feed import Feed
from realtime.wire import data, frames
from realtime.wire.frames import Rendering
from repository.engine.database import Database
from repository.engine.events import Event
from repository.engine.transaction import MAX_EVENT_ITEMS
from repository.generic import snapshots
from repository.generic.snapshots import Beginning

PAGE_ROWS = 500
FIRST_PAGE_ROWS = 100  # used until the size of the rows is known
MAX_PAGE_BYTES = 512 * 1024
MAX_UNDO_ROWS = 20_000
MAX_UNDO_BYTES = 16 * 1024 * 1024
UNDO_ROW_OVERHEAD = 1_500  # Decoded, a small movie takes about this many bytes more than encoded.
BEGIN_ATTEMPTS = 40
BEGIN_PAUSE_SECONDS = 0.05

Id = int | str


class SnapshotLost(Exception):
    """The log was replaced, or too much changed while the snapshot was read: the client has to start over."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a snapshot shows. `owner_id` is the user whose rows of a private topic are shown. `client` is the address or
    network for which the memory is counted, or empty.
    """

    topics: tuple[str, ...]
    filters: Mapping[str, Filter]
    rendering: Rendering
    audiences: frozenset[str]
    owner_id: int | None
    client: str = ""


class Snapshots:
    """One per process. It begins snapshots and reads their pages. Its `evaluation` evaluates the filters of snapshots
    and of subscriptions that catch up.
    """

    def __init__(self, database: Database, feed: Feed) -> None:
        self.database = database
        self.feed = feed
        self.evaluation = Evaluation()
        self.undo: UnsentBytes[Buffer] = UnsentBytes()

    async def begin(self, topics: Sequence[str]) -> Beginning:
        """Return a new snapshot's beginning once the feed has reached the snapshot's number. Raises Unavailable."""
        for _ in range(BEGIN_ATTEMPTS):
            found = await snapshots.beginning(self.database, topics)
            if found.head.epoch == self.feed.head.epoch:
                await self.feed.reach(found.head.seq)
                if found.head.epoch == self.feed.head.epoch:
                    return found
            # The log was replaced, but the feed has not noticed it yet.
            self.feed.poll_now()
            await asyncio.sleep(BEGIN_PAUSE_SECONDS)
        raise Unavailable("The log is being replaced")

    async def read(
        self, topic: str, wanted: Wanted, after: Id | None, until: int | None, max_rows: int
    ) -> snapshots.SnapshotPage:
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
    """The frames of one snapshot, one topic after another."""

    def __init__(self, source: Snapshots, wanted: Wanted, beginning: Beginning) -> None:
        self._topics = [_TopicSnapshot(source, wanted, topic, beginning) for topic in wanted.topics]

    @property
    def is_done(self) -> bool:
        return not self._topics

    async def next_page(self) -> list[bytes]:
        """Return the next frames. Raises Unavailable if the caller can try again, or SnapshotLost or PositionTooOld if
        all frames sent so far are invalid.
        """
        topic = self._topics[0]
        texts = await topic.next_page()
        if topic.is_done:
            topic.close()
            del self._topics[0]
        return texts

    def close(self) -> None:
        """Stop counting the memory of a snapshot that is not continued. Idempotent."""
        for topic in self._topics:
            topic.close()


class _TopicSnapshot:
    def __init__(self, source: Snapshots, wanted: Wanted, topic: str, beginning: Beginning) -> None:
        self.is_done = False
        self._source = source
        self._wanted = wanted
        self._topic = topic
        self._start = beginning.head
        self._searched = beginning.head.seq  # the number up to which the log was searched for changes to undo
        self._after: Id | None = None
        self._until = beginning.highest[topic]  # no row with a higher id is part of the snapshot
        self._undo: dict[Id, Row | None] = {}
        self._undo_bytes = 0
        self._rows = FIRST_PAGE_ROWS

    async def next_page(self) -> list[bytes]:
        page = await self._source.read(self._topic, self._wanted, self._after, self._until, self._rows)
        if page.head.epoch != self._start.epoch or page.head.seq < self._start.seq:
            raise SnapshotLost
        await self._collect_undo(page.head.seq)
        last = None if page.is_last else page.rows[-1]["id"]
        rows = as_of(page.rows, self._undo, last)
        if last is None:
            self.is_done = True
        else:
            self._after = last
            ahead = {key: row for key, row in self._undo.items() if key > last}
            self._undo_bytes = self._undo_bytes * len(ahead) // max(1, len(self._undo))
            self._undo = ahead
        metrics.SNAPSHOT_ROWS.inc(len(rows))
        return self._texts(rows)

    async def _collect_undo(self, seq: int) -> None:
        """Read the changes up to `seq` from the log into `_undo`."""
        feed = self._source.feed
        await feed.reach(seq)
        while self._searched < seq:
            if feed.head.epoch != self._start.epoch:
                raise SnapshotLost
            events = await feed.read_after(self._searched)
            if not events:
                await feed.reach(seq)
                continue
            for event in events:
                if event.seq <= seq:
                    await self._undo_event(event)
                    self._searched = event.seq
            if len(self._undo) > MAX_UNDO_ROWS or self._undo_bytes > MAX_UNDO_BYTES or self._is_client_full():
                raise SnapshotLost
            await asyncio.sleep(0)

    def buffered(self) -> int:
        """Return about how many bytes the changed rows take in memory."""
        return self._undo_bytes + len(self._undo) * UNDO_ROW_OVERHEAD

    def _is_client_full(self) -> bool:
        self._source.undo.count(self._wanted.client, self)
        return self._source.undo.is_full(self._wanted.client)

    def close(self) -> None:
        self._source.undo.forget(self._wanted.client, self)

    async def _undo_event(self, event: Event) -> None:
        if event.topic != self._topic or event.audience not in self._wanted.audiences:
            return
        changes = await self._source.evaluation.former_rows(event, self._wanted.filters.get(self._topic))
        for key, former in changes.items():
            # Nothing is undone for rows that have already been sent, nor for rows above `_until`, which are newer than
            # the snapshot.
            is_ahead = self._after is None or key > self._after  # type: ignore[operator]
            is_new = self._until is not None and key > self._until  # type: ignore[operator]
            if is_ahead and not is_new and key not in self._undo:
                self._undo[key] = former
                self._undo_bytes += (len(event.payload) + len(event.before or b"")) // len(changes)

    def _texts(self, rows: Sequence[Row]) -> list[bytes]:
        encoded = [data.encode(row) for row in rows]
        if encoded:
            mean = sum(map(len, encoded)) // len(encoded)
            self._rows = max(1, min(PAGE_ROWS, MAX_PAGE_BYTES // mean))
        elif not self.is_done:
            return []
        parts = list(data.frame_slices(encoded, max_bytes=MAX_PAGE_BYTES, max_items=MAX_EVENT_ITEMS))
        topic, rendering, seq, last = self._topic, self._wanted.rendering, self._start.seq, len(parts) - 1
        return [
            frames.snapshot_page(topic, rendering, seq, encoded[part], done=self.is_done and number == last)
            for number, part in enumerate(parts)
        ]


def as_of(found: Sequence[Row], undo: Mapping[Id, Row | None], last: Id | None) -> list[Row]:
    """Return the rows of a page as they were before the changes in `undo`, where None stands for a row that is not part
    of the snapshot. `last` is the id of the page's last row, or None if no row follows the page. Pure.
    """
    rows: dict[Id, Row] = {row["id"]: row for row in found}
    for key, row in undo.items():
        if last is not None and key > last:  # type: ignore[operator]
            continue
        if row is not None:
            rows[key] = row
        else:
            rows.pop(key, None)
    return [rows[key] for key in sorted(rows)]
