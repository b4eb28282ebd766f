"""Reading the log from a position for somebody: the pages of `GET /events`, and what its streams read with.

A position that cannot be gone on from gets a `resync` frame, never silence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from core.identity import ANONYMOUS_AUDIENCES, Identity
from realtime.fanout.spec import check_topics
from realtime.feed.feed import Feed, PositionTooOld
from realtime.wire import frames
from realtime.wire.frames import Rendering
from repository.engine import event_log
from repository.engine.database import Database
from repository.engine.events import Event, Head
from schemas import MAX_ID

PAGE_BYTES = 1024 * 1024
MAX_READS_PER_PAGE = 20  # of the log: a page for a quiet topic does not walk through all of the others

_EVENT_ID = re.compile(r"([!-9;-~]{1,64}):([0-9]{1,19})")


class Query(Protocol):
    """The parsed query of `GET /events`. Without `after` a page begins with the oldest event, a stream now."""

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
    """What of the log somebody may see and wants to, and how."""

    identity: Identity | None
    topics: frozenset[str]
    rendering: Rendering

    def text(self, event: Event) -> bytes | None:
        audiences = self.identity.audiences if self.identity is not None else ANONYMOUS_AUDIENCES
        if event.topic not in self.topics or event.audience not in audiences:
            return None
        return frames.event_text(event, self.rendering)


def view(identity: Identity | None, query: Query) -> View:
    """Raises Forbidden."""
    check_topics(query.topics, identity)
    return View(identity, query.topics, Rendering(query.bulk))


def position_text(head: Head) -> str:
    """`<epoch>:<seq>`, as in `Stream-Position` and the ids of a stream."""
    return f"{head.epoch}:{head.seq}"


def parse_position(text: str) -> Head | None:
    """None for anything but a position. Pure."""
    match = _EVENT_ID.fullmatch(text)
    return Head(match[1], int(match[2])) if match is not None and int(match[2]) <= MAX_ID else None


class Lost(Exception):
    """A position that the log cannot be read on from; the text is the reason in `resync`."""


class Replay:
    """One per process."""

    def __init__(self, database: Database, feed: Feed) -> None:
        self.feed = feed
        self._database = database

    async def page(self, identity: Identity | None, query: Query) -> tuple[Head, Sequence[bytes], bool]:
        """The number up to which was looked, the frames, and whether that is the end. Raises Forbidden, Unavailable."""
        wanted = view(identity, query)
        await self.feed.reach_head()
        generation, epoch = self.feed.generation, self.feed.head.epoch
        try:
            start = await self.start_after(query.after, query.epoch)
            if start is None:
                start = await self._before_the_oldest()
            seq, texts = await self._read_page(wanted, start, query.limit, generation)
        except Lost as lost:
            head = self.feed.head
            return head, [frames.resync(reason=str(lost), epoch=head.epoch, seq=head.seq)], True
        return Head(epoch, seq), texts, seq >= self.feed.head.seq

    async def start_after(self, after: int | None, epoch: str | None) -> int | None:
        """The position, once it is known to be good; None when none was given. Raises Lost and Unavailable."""
        if epoch is not None and epoch != self.feed.head.epoch:
            raise Lost("another epoch")
        if after is None:
            return None
        reason = await self.feed.check_position(after)
        if reason is not None:
            raise Lost(reason)
        return after

    async def read_on(self, seq: int, generation: int) -> list[Event]:
        """The next page after `seq` of the log that had this generation. Raises Lost and Unavailable."""
        try:
            found = await self.feed.read_after(seq)
        except PositionTooOld:
            found = []
            if generation == self.feed.generation:
                raise Lost("position is older than the log") from None
        if generation != self.feed.generation:
            raise Lost("the log was replaced")
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
