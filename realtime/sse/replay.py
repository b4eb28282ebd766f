"""Reading the log from a position as one identity: the pages of `GET /events`, and the reads of its streams.

A client whose position the log cannot continue receives a `resync` frame, never silence.
"""

from __future__ import annotations

import re
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
from schemas import MAX_EPOCH_LENGTH, MAX_ID

PAGE_BYTES = 1024 * 1024
MAX_READS_PER_PAGE = 20  # of the log: a page of a quiet topic must not read all the events of other topics

_EVENT_ID = re.compile(rf"([!-9;-~]{{1,{MAX_EPOCH_LENGTH}}}):([0-9]{{1,19}})")


class Query(Protocol):
    """The parsed query of `GET /events`. Without `after`, a page begins with the oldest event and a stream with the
    next one.
    """

    @property
    def topics(self) -> frozenset[str]: ...
    @property
    def after(self) -> int | None: ...
    @property
    def epoch(self) -> str | None: ...
    @property
    def bulk(self) -> Literal["items", "summary"]: ...
    @property
    def limit(self) -> int: ...


@dataclass(frozen=True, slots=True)
class View:
    """Which events of the log one client is shown, and how they are rendered."""

    identity: Identity | None
    topics: frozenset[str]
    rendering: Rendering

    def text(self, event: Event) -> bytes | None:
        """Return the frame of an event, or None when the client asked for other topics or may not see it."""
        if event.topic not in self.topics or event.audience not in audiences_of(self.identity):
            return None
        return frames.event_text(event, self.rendering)


def view(identity: Identity | None, query: Query) -> View:
    """Return the view of an identity. Raises Forbidden when it may not see one of the topics."""
    check_topics(query.topics, identity)
    return View(identity, query.topics, Rendering(query.bulk))


def parse_position(text: str) -> Head | None:
    """Parse `<epoch>:<seq>`. Return None for anything else. Pure."""
    match = _EVENT_ID.fullmatch(text)
    return Head(match[1], int(match[2])) if match is not None and int(match[2]) <= MAX_ID else None


class PositionLost(Exception):
    """The log cannot be continued from a position; the message is the reason in `resync`."""


class LogPage(NamedTuple):
    head: Head  # the epoch, and the number up to which the log was searched: the next `after`
    frames: Sequence[bytes]
    is_end: bool


class Replay:
    """One per process."""

    def __init__(self, database: Database, feed: Feed) -> None:
        self.feed = feed
        self._database = database

    async def page(self, identity: Identity | None, query: Query) -> LogPage:
        """Return one page. Raises Forbidden and Unavailable."""
        wanted = view(identity, query)
        await self.feed.reach_head()
        generation, epoch = self.feed.generation, self.feed.head.epoch
        try:
            start = await self.start_after(query.after, query.epoch)
            if start is None:
                start = await self._before_the_oldest()
            seq, texts = await self._read_page(wanted, start, query.limit, generation)
        except PositionLost as lost:
            head = self.feed.head
            return LogPage(head, [frames.resync(str(lost), head)], is_end=True)
        return LogPage(Head(epoch, seq), texts, is_end=seq >= self.feed.head.seq)

    async def start_after(self, after: int | None, epoch: str | None) -> int | None:
        """Check a position and return it, or None when none was given. Raises PositionLost and Unavailable."""
        if epoch is not None and epoch != self.feed.head.epoch:
            raise PositionLost(ANOTHER_EPOCH)
        if after is None:
            return None
        reason = await check_position(self.feed, after)
        if reason is not None:
            raise PositionLost(reason)
        return after

    async def read_on(self, seq: int, generation: int) -> list[Event]:
        """Return the events after `seq` of the log that had this generation. Raises PositionLost and Unavailable."""
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
