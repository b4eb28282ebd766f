"""One subscription of one socket: its position in the log, and how it catches up with the head.

Rules:
- A subscription is live or catching up. The hub writes every event to a live subscription.
- When a socket has more than MAX_UNSENT_BYTES of unsent frames, its subscriptions fall behind: they leave the hub,
  remember their position, and read from the ring or the log at the socket's own pace until they reach the head and
  become live again. The log is the buffer, so a slow reader costs no further memory and loses nothing. The same
  happens above HIGH_WATER_BYTES, if too many bytes wait for all sockets of the client (`realtime.wire.room`).
- A subscription also falls behind when its filter is too costly for a turn of the event loop. The filter is then
  evaluated in slices.
- A subscription that begins with a snapshot sends the snapshot at the socket's pace, and then catches up from the
  snapshot's number.
- A socket that accepts no data for SLOW_CLIENT_SECONDS is closed.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from contextvars import copy_context
from typing import Protocol

import structlog

from core import metrics
from core.errors import CloseCode, Unavailable
from realtime.fanout.snapshot import Snapshot, SnapshotLost, Snapshots, Wanted
from realtime.fanout.spec import Spec
from realtime.feed.feed import PAGE_BYTES, Feed, PositionTooOld
from realtime.feed.positions import LOG_REPLACED, TOO_OLD
from realtime.wire import frames
from realtime.wire.frames import Frames
from realtime.wire.room import PAUSE_SECONDS, Room
from realtime.wire.writer import HIGH_WATER_BYTES, Writer
from repository.engine.events import Head
from repository.generic.snapshots import Beginning

MAX_UNSENT_BYTES = 1024 * 1024
SLOW_CLIENT_SECONDS = 45.0  # a socket that does not accept a single byte for SLOW_CLIENT_SECONDS is closed
PROGRESS_CHECK_SECONDS = 1.0
MIN_BACKOFF_SECONDS = 0.05
MAX_BACKOFF_SECONDS = 2.0
MAX_LOST_SNAPSHOTS = 5  # a subscription that loses more than MAX_LOST_SNAPSHOTS snapshots in a row closes the socket

log = structlog.get_logger("subscription")


class TooSlow(Exception):
    """The socket accepted no data for SLOW_CLIENT_SECONDS."""


class LiveSubscriptions(Protocol):
    """The live subscriptions, to which the hub (`realtime.fanout.hub`) writes every event as it arrives."""

    def join(self, subscription: Subscription) -> None:
        """Make the subscription live. Its position must be the feed's head."""

    def leave(self, subscription: Subscription) -> None:
        """Release the subscription, and set its position to that of the last event that was written to it."""


class Subscription:
    """One subscription of a socket. `spec` describes what the subscription receives.

    `position` is the number of the last event handled. While the subscription is live, the hub knows it instead.
    The subscriptions of one socket share its `room`: while they catch up, one of them at a time waits for room, and
    writes before it yields. With `snapshot_of`, the subscription begins with a snapshot of these topics, in this order,
    and sends a new snapshot whenever its position is lost.
    """

    def __init__(
        self,
        spec: Spec,
        writer: Writer,
        room: Room,
        *,
        feed: Feed,
        live: LiveSubscriptions,
        snapshots: Snapshots,
        snapshot_of: tuple[str, ...] = (),
        owner_id: int | None = None,
    ) -> None:
        self.spec = spec
        self.writer = writer
        self.position = 0
        self.is_live = False
        self.room = room
        self._feed = feed
        self._live = live
        self._snapshots = snapshots
        self._generation = feed.generation
        self._snapshot_of = snapshot_of
        self._owner_id = owner_id
        self._snapshot: Snapshot | None = None
        self._restart_reason: str | None = None  # why the position was lost; set until a new snapshot begins
        self._lost_snapshots = 0
        self._reserved = 0  # bytes for the page that is being read or sent
        self._task: asyncio.Task[None] | None = None
        # With this context, the reads of a catch-up use the share of the client, even if the hub or the feed begins it.
        self._context = copy_context()

    def start(self, position: int) -> None:
        """Begin after `position`. The client has every event up to `position`."""
        self.position = position
        if position == self._feed.head.seq:
            self._live.join(self)
        else:
            self._begin_catching_up()

    def start_with_snapshot(self, beginning: Beginning, reason: str | None = None) -> None:
        """Begin with the rows as of `beginning`. `reason`, if any, is why the client cannot continue at its position;
        the reason is sent first, in a `resync` frame.
        """
        if reason is not None:
            self._send_resync(reason, beginning.head)
        self._begin_snapshot(beginning)
        self._begin_catching_up()

    def start_over(self, reason: str) -> None:
        """Begin at the head, or with a snapshot, because the client cannot continue at the position it requested."""
        self.restart(reason)
        if not self._snapshot_of:
            self.start(self.position)

    def stop(self) -> None:
        """End the subscription. No frame is written after this."""
        if self.is_live:
            self._live.leave(self)
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._end_snapshot()

    def change_spec(self, spec: Spec) -> None:
        """Continue with another spec from the same position."""
        was_live = self.is_live
        if was_live:
            self._live.leave(self)
        self.spec = spec
        if was_live:
            self.start(self.position)

    def is_full(self, unsent: int) -> bool:
        """Return whether a live subscription with so many unsent bytes on its socket has to fall behind."""
        return unsent > MAX_UNSENT_BYTES or (unsent > HIGH_WATER_BYTES and self.room.is_full())

    def fall_behind(self, position: int) -> None:
        """Continue from `position` at the socket's pace. The hub must have released the subscription."""
        self.is_live = False
        self.position = position
        self._begin_catching_up()

    def restart(self, reason: str) -> None:
        """Send `resync`, because the position is invalid, and continue from the head or from a new snapshot."""
        self._generation = self._feed.generation
        if self._snapshot_of:
            if self.is_live:
                self._live.leave(self)
            self._end_snapshot()
            self._restart_reason = reason
            self._begin_catching_up()
        else:
            self.position = self._feed.head.seq
            self._send_resync(reason, self._feed.head)

    def _send_resync(self, reason: str, head: Head) -> None:
        metrics.RESYNCS.labels(reason).inc()
        self.writer.write(Frames([frames.resync(reason, head, self.spec.rendering.subscription)]))

    def _begin_snapshot(self, beginning: Beginning) -> None:
        spec = self.spec
        wanted = Wanted(
            self._snapshot_of, dict(spec.filters), spec.rendering, spec.audiences, self._owner_id, self.room.client
        )
        self._snapshot, self._restart_reason = Snapshot(self._snapshots, wanted, beginning), None
        self._generation = self._feed.generation
        self.position = beginning.head.seq

    def _end_snapshot(self) -> None:
        if self._snapshot is not None:
            self._snapshot.close()
            self._snapshot = None

    # --- catching up

    def _begin_catching_up(self) -> None:
        if self._task is None:
            metrics.CATCH_UPS.inc()
            self._task = asyncio.create_task(self._catch_up(), name="catch-up", context=self._context)
            self._task.add_done_callback(self._on_caught_up)

    def _on_caught_up(self, task: asyncio.Task[None]) -> None:
        if self._task is task:
            self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("catch-up failed", exc_info=error)
            self.writer.close(CloseCode.SERVICE_RESTART)

    async def _catch_up(self) -> None:
        backoff = MIN_BACKOFF_SECONDS
        while True:
            try:
                # Wait first, so that nothing is read for a socket that has no room.
                await self._wait_for_page()
                try:
                    has_sent = await (self._send_rows() if self._has_rows_to_send else self._send_page())
                finally:
                    self._reserve(0)
                backoff = MIN_BACKOFF_SECONDS
            except TooSlow:
                log.info("slow client closed", position=self.position, head=self._feed.head.seq)
                self.writer.close(CloseCode.TOO_SLOW)
                return
            except PositionTooOld:
                self._lose_position(TOO_OLD)
                continue
            except SnapshotLost:
                self._lose_position("the snapshot could not be finished")
                continue
            except Unavailable:
                await asyncio.sleep(backoff)
                backoff = min(backoff * 2, MAX_BACKOFF_SECONDS)
                continue
            if not has_sent:
                if self.position == self._feed.head.seq:
                    self._task = None
                    self._live.join(self)
                    return
                # The position is ahead of this worker's feed, which will reach the position soon.
                await asyncio.sleep(backoff)
            # Reading from the ring does not yield, so let other tasks run between two pages.
            await asyncio.sleep(0)

    @property
    def _has_rows_to_send(self) -> bool:
        return self._snapshot is not None or self._restart_reason is not None

    def _lose_position(self, reason: str) -> None:
        if self._snapshot is not None:
            self._lost_snapshots += 1
        if self._lost_snapshots > MAX_LOST_SNAPSHOTS:
            self.writer.close(CloseCode.TOO_SLOW)
            self._lost_snapshots = 0
        self.restart(reason)

    def buffered(self) -> int:
        """Return how many bytes of the client's limit are reserved for the page that is being read or sent."""
        return self._reserved

    def _write(self, texts: list[bytes]) -> None:
        written = Frames(texts)
        self.writer.write(written)
        self.room.wrote(written.size)

    def _reserve(self, size: int) -> None:
        self._reserved = size
        self.room.hold(self)

    async def _wait_for_page(self) -> None:
        """Wait until the socket has room and few enough bytes wait for all sockets of the client. Reserve PAGE_BYTES.

        `room.turn` is not held while the client must read from other sockets first: the subscriptions of this socket
        that have reserved a page need it to send the page. Raises TooSlow.
        """
        async with self.room.page_turn:
            while True:
                await self._snapshots.evaluation.pages.turn()
                await self._wait_for_room()
                if not self.room.is_full():
                    self._reserve(PAGE_BYTES)
                    return
                await asyncio.sleep(PAUSE_SECONDS)

    async def _wait_for_room(self) -> None:
        """Wait until the socket has room. The caller must write before it yields to the event loop.

        Raises TooSlow when the socket has accepted no data for SLOW_CLIENT_SECONDS.
        """
        async with self.room.turn:
            taken, since = self.writer.taken(), time.monotonic()
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(PROGRESS_CHECK_SECONDS):
                        await self.writer.drained()
                        return
                if self.writer.taken() > taken:
                    taken, since = self.writer.taken(), time.monotonic()
                elif time.monotonic() - since > SLOW_CLIENT_SECONDS:
                    raise TooSlow

    async def _send_page(self) -> bool:
        """Send the next events. Return False when there are none."""
        page = await self._feed.read_after(self.position)
        if self._generation != self._feed.generation:
            self.restart(LOG_REPLACED)
            return True
        if not page:
            return False
        spec = self.spec
        texts = await self._snapshots.evaluation.texts(spec, page)
        if texts:
            await self._wait_for_room()
        if spec is not self.spec or self._generation != self._feed.generation:
            return True  # the identity or the log has changed, so the caller reads the page again
        if texts:
            self._write(texts)
        self.position = page[-1].seq
        return True

    async def _send_rows(self) -> bool:
        """Send the next rows of the snapshot. Always returns True, because events follow the snapshot."""
        if self._restart_reason is not None:
            beginning = await self._snapshots.begin(self._snapshot_of)
            self._send_resync(self._restart_reason, beginning.head)
            self._begin_snapshot(beginning)
        snapshot = self._snapshot
        assert snapshot is not None
        # Wait for room before each frame, because the unsent bytes of a whole page could exceed the socket's limit.
        for text in await snapshot.next_page():
            await self._wait_for_room()
            if self._generation != self._feed.generation:
                self.restart(LOG_REPLACED)
                return True
            self._write([text])
        if snapshot.is_done:
            self._end_snapshot()
            self._lost_snapshots = 0
        return True
