"""What a watcher wants (`Spec`), and where it is in the stream (`Subscription`).

A subscription is live or catching up. Live ones are written to by the hub, all that are equal at once. When a socket's
unsent bytes pass the limit, its subscriptions fall behind: they leave the hub, remember their place, and read on from
the ring or the log at the socket's own pace until they reach the head and go live again. The log is the buffer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from errors import CLOSE_REASONS, CloseCode, Forbidden, Unavailable
from realtime import frames
from realtime.feed import Feed, PositionTooOld
from realtime.frames import Frames, Rendering
from realtime.stream import Stream
from repository.event_log import Event
from schemas import TOPICS
from security import ANONYMOUS_AUDIENCES, Identity

if TYPE_CHECKING:
    from realtime.hub import Hub

MAX_UNSENT_BYTES = 1024 * 1024
SLOW_CLIENT_SECONDS = 45.0  # without taking a single byte
PROGRESS_CHECK_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 2.0

log = structlog.get_logger("subscription")


@dataclass(frozen=True, slots=True)
class Spec:
    """Equal specs share one group in the hub, and every byte that is sent."""

    topics: frozenset[str]
    rendering: Rendering = field(default_factory=Rendering)
    audiences: frozenset[str] = ANONYMOUS_AUDIENCES

    def admits(self, event: Event) -> bool:
        return event.topic in self.topics and event.audience in self.audiences

    def texts(self, events: Sequence[Event]) -> list[bytes]:
        return [frames.event_text(event, self.rendering) for event in events if self.admits(event)]


def check_topics(topics: frozenset[str], identity: Identity | None) -> None:
    """Raises Forbidden when one of them is not for this identity."""
    for topic in sorted(topics):
        reader = TOPICS[topic]
        if reader != "public" and (identity is None or identity.group != reader):
            raise Forbidden(f"Topic {topic} is for {reader}s")


class Subscription:
    """One spec on one socket. `position` is the last number it has dealt with; while live, the hub knows better."""

    def __init__(self, spec: Spec, stream: Stream, feed: Feed, hub: Hub) -> None:
        self.spec = spec
        self.stream = stream
        self.position = 0
        self.is_live = False
        self._generation = feed.generation
        self._feed = feed
        self._hub = hub
        self._task: asyncio.Task[None] | None = None

    def start(self, position: int) -> None:
        """Begin after `position`."""
        self.position = position
        if position == self._feed.head.seq:
            self._hub.join(self)
        else:
            self._begin_catching_up()

    def stop(self) -> None:
        if self.is_live:
            self._hub.leave(self)
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def respec(self, spec: Spec) -> None:
        """Go on with another spec from the same place."""
        if self.is_live:
            self._hub.leave(self)
            self.spec = spec
            self._hub.join(self)
        else:
            self.spec = spec

    def fall_behind(self, position: int) -> None:
        """The hub lets go of it: the socket takes no more for now."""
        self.position = position
        self._begin_catching_up()

    def restart(self, reason: str) -> None:
        """Its place means nothing any more: say so, and go on from the head."""
        head = self._feed.head
        self._generation = self._feed.generation
        self.stream.write(Frames([frames.resync(reason=reason, epoch=head.epoch, seq=head.seq)]))
        self.position = head.seq

    def _begin_catching_up(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._catch_up(), name="catch-up")
            self._task.add_done_callback(self._caught_up)

    def _caught_up(self, task: asyncio.Task[None]) -> None:
        if self._task is task:
            self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("catching up failed", exc_info=error)
            self.stream.close(CloseCode.SERVICE_RESTART, CLOSE_REASONS[CloseCode.SERVICE_RESTART])

    async def _catch_up(self) -> None:
        backoff = 0.05
        while True:
            if not await self._wait_until_drained():
                log.info("closed as too slow", position=self.position, head=self._feed.head.seq)
                self.stream.close(CloseCode.TOO_SLOW, CLOSE_REASONS[CloseCode.TOO_SLOW])
                return
            try:
                page = await self._feed.read_after(self.position)
                backoff = 0.05
                if self._generation != self._feed.generation:
                    self.restart("the log was replaced")
                    continue
            except PositionTooOld:
                self.restart("position is older than the log")
                continue
            except Unavailable:
                await asyncio.sleep(backoff)
                backoff = min(backoff * 2, MAX_BACKOFF_SECONDS)
                continue
            if not page:
                if self.position > self._feed.head.seq:
                    # Ahead of this worker's stream: it is on its way.
                    await asyncio.sleep(backoff)
                    continue
                self._task = None
                self._hub.join(self)
                return
            texts = self.spec.texts(page)
            if texts:
                self.stream.write(Frames(texts))
            self.position = page[-1].seq
            # The ring answers without waiting: let others run between two pages.
            await asyncio.sleep(0)

    async def _wait_until_drained(self) -> bool:
        """False when the peer took nothing for too long."""
        taken, since = self.stream.taken(), time.monotonic()
        while True:
            try:
                async with asyncio.timeout(PROGRESS_CHECK_SECONDS):
                    await self.stream.drained()
                return True
            except TimeoutError:
                if self.stream.taken() > taken:
                    taken, since = self.stream.taken(), time.monotonic()
                elif time.monotonic() - since > SLOW_CLIENT_SECONDS:
                    return False
