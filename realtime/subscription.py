"""What a watcher wants (`Spec`), and where it is in the stream (`Subscription`).

A subscription is live or catching up. Live ones are written to by the hub, all that are equal at once. When a socket's
unsent bytes pass the limit, its subscriptions fall behind: they leave the hub, remember their place, and read on from
the ring or the log at the socket's own pace until they reach the head and go live again. The log is the buffer. One
that begins with a snapshot sends that first, in the same way, and then catches up from the snapshot's number.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

import metrics
from errors import CLOSE_REASONS, CloseCode, Forbidden, Unavailable
from filters import Filter
from realtime import frames
from realtime.changes import filtered_texts
from realtime.feed import Feed, PositionTooOld
from realtime.frames import Frames, Rendering
from realtime.latest import coalesce
from realtime.snapshot import Snapshot, SnapshotLost, Snapshots, Wanted
from realtime.stream import Stream
from repository.event_log import Event
from repository.snapshots import Beginning
from schemas import TOPICS
from security import ANONYMOUS_AUDIENCES, Identity

if TYPE_CHECKING:
    from realtime.hub import Hub

MAX_UNSENT_BYTES = 1024 * 1024
SLOW_CLIENT_SECONDS = 45.0  # without taking a single byte
PROGRESS_CHECK_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 2.0
MAX_LOST_SNAPSHOTS = 5  # one after the other, of one subscription

log = structlog.get_logger("subscription")


@dataclass(frozen=True, slots=True)
class Spec:
    """Equal specs share one group in the hub, and every byte that is sent.

    `filters` holds one for each topic, or nothing when everything is wanted.
    """

    topics: frozenset[str]
    rendering: Rendering = field(default_factory=Rendering)
    audiences: frozenset[str] = ANONYMOUS_AUDIENCES
    filters: tuple[tuple[str, Filter], ...] = ()
    latest_every_ms: int | None = None

    def admits(self, event: Event) -> bool:
        return event.topic in self.topics and event.audience in self.audiences

    def texts(self, events: Sequence[Event]) -> list[bytes]:
        """The frames of consecutive events for somebody who catches up."""
        if self.latest_every_ms is not None:
            return coalesce(self, events)
        admitted = [event for event in events if self.admits(event)]
        if not self.filters:
            return [frames.event_text(event, self.rendering) for event in admitted]
        filters = dict(self.filters)
        return [text for event in admitted for text in filtered_texts(event, self.rendering, filters[event.topic])]


def check_topics(topics: frozenset[str], identity: Identity | None) -> None:
    """Raises Forbidden when one of them is not for this identity."""
    for topic in sorted(topics):
        reader = TOPICS[topic]
        if reader == "self" and identity is None:
            raise Forbidden(f"Topic {topic} is for those who sign in")
        if reader not in ("public", "self") and (identity is None or identity.group != reader):
            raise Forbidden(f"Topic {topic} is for {reader}s")


@dataclass(frozen=True, slots=True)
class Sources:
    """Where subscriptions get their events and rows from; one per process."""

    feed: Feed
    hub: Hub
    snapshots: Snapshots


class Subscription:
    """One spec on one socket. `position` is the last number it has dealt with; while live, the hub knows better.

    `turn` is shared by all that write to the socket at its own pace: one at a time looks whether it has room and fills
    it. With `topics`, it begins with a snapshot of them, in that order, and begins anew when its place is lost.
    """

    def __init__(
        self,
        spec: Spec,
        stream: Stream,
        sources: Sources,
        turn: asyncio.Lock,
        *,
        snapshot_of: tuple[str, ...] = (),
        owner_id: int | None = None,
    ) -> None:
        self.spec = spec
        self.stream = stream
        self.position = 0
        self.is_live = False
        self._sources = sources
        self._feed = sources.feed
        self._hub = sources.hub
        self._turn = turn
        self._generation = sources.feed.generation
        self._snapshot_of = snapshot_of
        self._owner_id = owner_id
        self._snapshot: Snapshot | None = None
        self._owes_snapshot = False
        self._lost_snapshots = 0
        self._task: asyncio.Task[None] | None = None

    def start(self, position: int) -> None:
        """Begin after `position`, which the client has."""
        self.position = position
        if position == self._feed.head.seq:
            self._hub.join(self)
        else:
            self._begin_catching_up()

    def start_with_snapshot(self, beginning: Beginning) -> None:
        """Begin with the rows as of then."""
        self._begin_snapshot(beginning)
        self._begin_catching_up()

    def start_over(self, reason: str) -> None:
        """Begin, though the client's place is no good."""
        self.restart(reason)
        if not self._snapshot_of:
            self.start(self.position)

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
            self.start(self.position)
        else:
            self.spec = spec

    def fall_behind(self, position: int) -> None:
        """The hub lets go of it: the socket takes no more for now."""
        self.is_live = False
        self.position = position
        self._begin_catching_up()

    def restart(self, reason: str) -> None:
        """Its place means nothing any more: say so, and go on from the head."""
        if self.is_live and self._snapshot_of:
            self._hub.leave(self)
        metrics.RESYNCS.labels(reason).inc()
        head = self._feed.head
        self._generation = self._feed.generation
        text = frames.resync(
            reason=reason, epoch=head.epoch, seq=head.seq, subscription=self.spec.rendering.subscription
        )
        self.stream.write(Frames([text]))
        self.position = head.seq
        if self._snapshot_of:
            self._snapshot, self._owes_snapshot = None, True
            self._begin_catching_up()

    def _begin_snapshot(self, beginning: Beginning) -> None:
        spec = self.spec
        wanted = Wanted(self._snapshot_of, dict(spec.filters), spec.rendering, spec.audiences, self._owner_id)
        self._snapshot = Snapshot(self._sources.snapshots, wanted, beginning)
        self._owes_snapshot = False
        self.position = beginning.head.seq

    def _begin_catching_up(self) -> None:
        if self._task is None:
            metrics.CATCH_UPS.inc()
            self._task = asyncio.create_task(self._catch_up(), name="catch-up")
            self._task.add_done_callback(self._caught_up)

    def _caught_up(self, task: asyncio.Task[None]) -> None:
        if self._task is task:
            self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("catching up failed", exc_info=error)
            self._close(CloseCode.SERVICE_RESTART)

    def _close(self, code: CloseCode) -> None:
        self.stream.close(code, CLOSE_REASONS[code])

    async def _catch_up(self) -> None:
        backoff = 0.05
        while True:
            try:
                async with self._turn:
                    if not await self._wait_until_drained():
                        log.info("closed as too slow", position=self.position, head=self._feed.head.seq)
                        self._close(CloseCode.TOO_SLOW)
                        return
                    if self._owes_snapshot:
                        self._begin_snapshot(await self._sources.snapshots.begin(self._snapshot_of))
                    is_at_head = not await (self._send_page() if self._snapshot is None else self._send_rows())
                backoff = 0.05
            except PositionTooOld:
                self._lose_place("position is older than the log")
            except SnapshotLost:
                self._lose_place("the snapshot could not be finished")
            except Unavailable:
                is_at_head = False
                await asyncio.sleep(backoff)
                backoff = min(backoff * 2, MAX_BACKOFF_SECONDS)
                continue
            else:
                if is_at_head and self.position == self._feed.head.seq:
                    self._task = None
                    self._hub.join(self)
                    return
                if is_at_head:
                    # Ahead of this worker's stream: it is on its way.
                    await asyncio.sleep(backoff)
            if self._lost_snapshots > MAX_LOST_SNAPSHOTS:
                self._close(CloseCode.TOO_SLOW)
                return
            # The ring answers without waiting: let others run between two pages.
            await asyncio.sleep(0)

    def _lose_place(self, reason: str) -> None:
        if self._snapshot is not None:
            self._lost_snapshots += 1
        self.restart(reason)

    async def _send_page(self) -> bool:
        """Send the next events; False when there are none."""
        page = await self._feed.read_after(self.position)
        if self._generation != self._feed.generation:
            self.restart("the log was replaced")
            return True
        if not page:
            return False
        texts = self.spec.texts(page)
        if texts:
            self.stream.write(Frames(texts))
        self.position = page[-1].seq
        return True

    async def _send_rows(self) -> bool:
        """Send the next rows of the snapshot; True, for events follow."""
        assert self._snapshot is not None
        texts = await self._snapshot.next_page()
        if self._generation != self._feed.generation:
            self.restart("the log was replaced")
            return True
        if texts:
            self.stream.write(Frames(texts))
        if self._snapshot.is_done:
            self._snapshot = None
            self._lost_snapshots = 0
        return True

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
