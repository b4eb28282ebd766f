"""What a watcher wants (`Spec`), and where it is in the stream (`Subscription`).

A subscription is live or catching up. Live ones are written to by the hub, all that are equal at once. When a socket's
unsent bytes pass the limit, its subscriptions fall behind: they leave the hub, remember their place, and read on from
the ring or the log at the socket's own pace until they reach the head and go live again. The log is the buffer. One
that begins with a snapshot sends that first, in the same way, and then catches up from the snapshot's number.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Protocol

import structlog

from core import metrics
from core.errors import CLOSE_REASONS, CloseCode, Unavailable
from realtime.fanout import encode
from realtime.fanout.snapshot import Snapshot, SnapshotLost, Snapshots, Wanted
from realtime.fanout.spec import Spec
from realtime.feed.feed import Feed, PositionTooOld
from realtime.wire import frames
from realtime.wire.frames import Frames
from realtime.wire.writer import Writer
from repository.engine.events import Head
from repository.generic.snapshots import Beginning

MAX_UNSENT_BYTES = 1024 * 1024
SLOW_CLIENT_SECONDS = 45.0  # without taking a single byte
PROGRESS_CHECK_SECONDS = 1.0
MIN_BACKOFF_SECONDS = 0.05
MAX_BACKOFF_SECONDS = 2.0
MAX_LOST_SNAPSHOTS = 5  # one after the other, of one subscription

log = structlog.get_logger("subscription")


class TooSlow(Exception):
    """The socket took nothing for SLOW_CLIENT_SECONDS."""


class LiveSubscriptions(Protocol):
    """The subscriptions that are live (`realtime.fanout.hub`): each is written every event as it comes."""

    def join(self, subscription: Subscription) -> None:
        """Make the subscription live. Its position must be the feed's head."""

    def leave(self, subscription: Subscription) -> None:
        """Write what is pending and let go of the subscription, whose position is then up to date."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where subscriptions get their events and rows from; one per process."""

    feed: Feed
    live: LiveSubscriptions
    snapshots: Snapshots


class Subscription:
    """One spec on one socket. `position` is the last number it has dealt with; while live, the hub knows better.

    `turn` is shared by all that write to the socket at its own pace: one at a time looks whether it has room and fills
    it. With `topics`, it begins with a snapshot of them, in that order, and begins anew when its place is lost.
    """

    def __init__(
        self,
        spec: Spec,
        stream: Writer,
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
        self._live = sources.live
        self._turn = turn
        self._generation = sources.feed.generation
        self._snapshot_of = snapshot_of
        self._owner_id = owner_id
        self._snapshot: Snapshot | None = None
        self._owed: str | None = None  # the reason for which a snapshot is still to be begun anew
        self._lost_snapshots = 0
        self._task: asyncio.Task[None] | None = None

    def start(self, position: int) -> None:
        """Begin after `position`, which the client has."""
        self.position = position
        if position == self._feed.head.seq:
            self._live.join(self)
        else:
            self._begin_catching_up()

    def start_with_snapshot(self, beginning: Beginning, reason: str | None = None) -> None:
        """Begin with the rows as of then; with `reason`, say first that the client's place is no good."""
        if reason is not None:
            self._say_resync(reason, beginning.head)
        self._begin_snapshot(beginning)
        self._begin_catching_up()

    def start_over(self, reason: str) -> None:
        """Begin at the head, though the client asked for another place."""
        self.restart(reason)
        if not self._snapshot_of:
            self.start(self.position)

    def stop(self) -> None:
        if self.is_live:
            self._live.leave(self)
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def respec(self, spec: Spec) -> None:
        """Go on with another spec from the same place."""
        was_live = self.is_live
        if was_live:
            self._live.leave(self)
        self.spec = spec
        # Leaving writes what was pending, which may have filled the socket: then it is behind already.
        if was_live and self._task is None:
            self.start(self.position)

    def fall_behind(self, position: int) -> None:
        """The hub lets go of it: the socket takes no more for now."""
        self.is_live = False
        self.position = position
        self._begin_catching_up()

    def restart(self, reason: str) -> None:
        """Its place means nothing any more: say so, and go on from the head, or from a new snapshot."""
        self._generation = self._feed.generation
        if self._snapshot_of:
            if self.is_live:
                self._live.leave(self)
            self._snapshot, self._owed = None, reason
            self._begin_catching_up()
        else:
            self.position = self._feed.head.seq
            self._say_resync(reason, self._feed.head)

    def _say_resync(self, reason: str, head: Head) -> None:
        metrics.RESYNCS.labels(reason).inc()
        name = self.spec.rendering.subscription
        self.stream.write(Frames([frames.resync(reason=reason, epoch=head.epoch, seq=head.seq, subscription=name)]))

    def _begin_snapshot(self, beginning: Beginning) -> None:
        spec = self.spec
        wanted = Wanted(self._snapshot_of, dict(spec.filters), spec.rendering, spec.audiences, self._owner_id)
        self._snapshot, self._owed = Snapshot(self._sources.snapshots, wanted, beginning), None
        self._generation = self._feed.generation
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
        backoff = MIN_BACKOFF_SECONDS
        while True:
            try:
                # Nothing is read for a socket that has no room.
                await self._room()
                is_at_head = not await (self._send_page() if not self._has_rows_to_send else self._send_rows())
                backoff = MIN_BACKOFF_SECONDS
            except TooSlow:
                log.info("closed as too slow", position=self.position, head=self._feed.head.seq)
                self._close(CloseCode.TOO_SLOW)
                return
            except PositionTooOld:
                self._lose_place("position is older than the log")
                continue
            except SnapshotLost:
                self._lose_place("the snapshot could not be finished")
                continue
            except Unavailable:
                await asyncio.sleep(backoff)
                backoff = min(backoff * 2, MAX_BACKOFF_SECONDS)
                continue
            if is_at_head:
                if self.position == self._feed.head.seq:
                    self._task = None
                    self._live.join(self)
                    return
                # Ahead of this worker's stream: it is on its way.
                await asyncio.sleep(backoff)
            # The ring answers without waiting: let others run between two pages.
            await asyncio.sleep(0)

    @property
    def _has_rows_to_send(self) -> bool:
        return self._snapshot is not None or self._owed is not None

    def _lose_place(self, reason: str) -> None:
        if self._snapshot is not None:
            self._lost_snapshots += 1
        if self._lost_snapshots > MAX_LOST_SNAPSHOTS:
            self._close(CloseCode.TOO_SLOW)
            self._lost_snapshots = 0
        self.restart(reason)

    async def _room(self) -> None:
        """Wait until the socket has taken what was written before. The caller writes before it lets others run.

        Raises TooSlow when it took nothing for too long.
        """
        async with self._turn:
            if not await self._wait_until_drained():
                raise TooSlow

    async def _send_page(self) -> bool:
        """Send the next events; False when there are none."""
        page = await self._feed.read_after(self.position)
        if self._generation != self._feed.generation:
            self.restart("the log was replaced")
            return True
        if not page:
            return False
        texts = encode.texts(self.spec, page)
        if texts:
            spec = self.spec
            await self._room()
            if spec is not self.spec or self._generation != self._feed.generation:
                return True  # it may see something else now, or the log is another: read again
            self.stream.write(Frames(texts))
        self.position = page[-1].seq
        return True

    async def _send_rows(self) -> bool:
        """Send the next rows of the snapshot; True, for events follow."""
        if self._owed is not None:
            beginning = await self._sources.snapshots.begin(self._snapshot_of)
            self._say_resync(self._owed, beginning.head)
            self._begin_snapshot(beginning)
        snapshot = self._snapshot
        assert snapshot is not None
        # In parts, each when the one before was taken: a page of large rows is more than a socket may have unsent.
        for text in await snapshot.next_page():
            await self._room()
            if self._generation != self._feed.generation:
                self.restart("the log was replaced")
                return True
            self.stream.write(Frames([text]))
        if snapshot.is_done:
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
