"""Reads the log from a position on behalf of one identity, for the pages and the streams of `GET /events`.

If the log cannot be continued from a client's position, the client always receives a `resync` frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from core.identity import Identity
from realtime.fanout.spec import audiences_of, check_topics
from realtime.feed.feed import Feed, PositionTooOld
from realtime.feed.positions import ANOTHER_EPOCH, LOG_REPLACED, TOO_OLD, check_position
from realtime.wire import frames
from realtime.wire.frames import Rendering
from repository.engine import event_log
from repository.engine.database import Database
from repository.engine.events import Event, Head
from repository.engine.positions import parse_position

PAGE_BYTES = 1024 * 1024
MAX_READS_PER_PAGE = 20  # a page of a quiet topic must not read all events of the other topics in the log


class Query(Protocol):
    """The parsed query of `GET /events`. Without a position, a page begins with the oldest event, and a stream begins
    with the next new event.
    """

    @property
    def topics(self) -> frozenset[str]: ...
    @property
    def position(self) -> Head | None: ...
    @property
    def epoch(self) -> str | None: ...
    @property
    def last_event_id(self) -> str | None: ...
    @property
    def bulk(self) -> Literal["items", "summary"]: ...
    @property
    def limit(self) -> int: ...


@dataclass(frozen=True, slots=True)
class View:
    """Which events of the log are sent to a client, and how they are rendered."""

    identity: Identity | None
    topics: frozenset[str]
    rendering: Rendering

    def text(self, event: Event) -> bytes | None:
        """Return the frame of an event, or None if the client did not request its topic or may not see it."""
        if event.topic not in self.topics or event.audience not in audiences_of(self.identity):
            return None
        return frames.event_text(event, self.rendering)


def view(identity: Identity | None, query: Query) -> View:
    """Return the view of an identity. Raises Forbidden when it may not see one of the topics."""
    check_topics(query.topics, identity)
    return View(identity, query.topics, Rendering(query.bulk))


class PositionLost(Exception):
    """The log cannot be continued from a position. The message is the reason in the `resync` frame."""


class LogPage(NamedTuple):
    head: Head  # the position up to which the log was searched, to be passed as the next `after`
    frames: Sequence[bytes]
    is_end: bool


class Replay:
    """Reads the event log for `GET /events`. One per process."""

    def __init__(self, database: Database, feed: Feed) -> None:
        self.feed = feed
        self._database = database

    async def page(self, identity: Identity | None, query: Query) -> LogPage:
        """Return one page. Raises Forbidden or Unavailable."""
        wanted = view(identity, query)
        await self.feed.reach_head()
        generation, epoch = self.feed.generation, self.feed.head.epoch
        try:
            position = self.requested_position(query)
            start = position.seq if position is not None else await self._before_the_oldest()
            if position is not None:
                await self.check(position)
            seq, texts = await self._read_page(wanted, start, query.limit, generation)
        except PositionLost as lost:
            head = self.feed.head
            return LogPage(head, [frames.resync(str(lost), head)], is_end=True)
        return LogPage(Head(epoch, seq), texts, is_end=seq >= self.feed.head.seq)

    def requested_position(self, query: Query, last_event_id: str | None = None) -> Head | None:
        """Return the position that the client requests, or None if it requests none.

        An event id, in the header or the query, takes precedence over `after`. An id that is not a position came from
        another service. It is treated as lost, because an error response would make a browser stop reconnecting.

        Raises PositionLost for such an id or for another epoch, or Conflict for a number without an epoch.
        """
        event_id = last_event_id or query.last_event_id
        if event_id:
            position = parse_position(event_id)
            is_lost = position is None
        else:
            position = query.position
            is_lost = query.epoch not in (None, self.feed.head.epoch)
        if is_lost or (position is not None and position.epoch != self.feed.head.epoch):
            raise PositionLost(ANOTHER_EPOCH)
        return position

    async def check(self, position: Head) -> None:
        """Raise PositionLost if the log cannot be continued from a position, or Unavailable if it cannot be read."""
        if position.epoch != self.feed.head.epoch:
            raise PositionLost(ANOTHER_EPOCH)
        reason = await check_position(self.feed, position.seq)
        if reason is not None:
            raise PositionLost(reason)

    async def read_on(self, seq: int, generation: int) -> list[Event]:
        """Return the events after `seq` in the log of the given `generation`. Raises PositionLost or Unavailable."""
        try:
            found = await self.feed.read_after(seq)
        except PositionTooOld:
            found = []
            if generation == self.feed.generation:
                raise PositionLost(TOO_OLD) from None
        if generation != self.feed.generation:
            raise PositionLost(LOG_REPLACED)
        return found

    async def _before_the_oldest(self) -> int:
        oldest = await event_log.oldest(self._database)
        return oldest - 1 if oldest is not None else self.feed.head.seq

    async def _read_page(self, wanted: View, seq: int, limit: int, generation: int) -> tuple[int, list[bytes]]:
        texts: list[bytes] = []
        size = 0
        for _ in range(MAX_READS_PER_PAGE):
            for event in await self.read_on(seq, generation):
                text = wanted.text(event)
                if text is not None:
                    size += len(text)
                    if len(texts) == limit or (texts and size > PAGE_BYTES):
                        return seq, texts
                    texts.append(text)
                seq = event.seq
            if seq >= self.feed.head.seq:
                break
        return seq, texts
