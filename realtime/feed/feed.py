"""This process's stream of events: every event once, in order, from wherever it can be had.

Invariants:
- `head` only moves to the next number; listeners see each number exactly once and in order.
- The bus is an accelerator. An event that is not the next waits a moment for those before it; when they do not come, or
  when the log's head is seen to be ahead, the missing ones are read from the log.
- The log's head is read from the database at an interval that depends on how good the bus is, so that a process without
  a bus, or with a deaf one, lags and never loses.
- Another epoch, or a head that went backwards, means another log: listeners are told to start over.

Only `run` awaits; `offer` and `hear_head` may be called from anywhere in the loop. Cancelling `run` stops it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from core import metrics
from core.errors import Unavailable
from realtime.feed.ring import Ring
from repository.engine import event_log
from repository.engine.database import Database
from repository.engine.events import Event, Head

GAP_GRACE_SECONDS = 0.02  # commits of several writers reach the bus out of order by about this much at most
PENDING_EVENTS = 1_000
PENDING_BYTES = 8 * 1024 * 1024
PAGE_EVENTS = 500
PAGE_BYTES = 512 * 1024
REMEMBERED_EVENTS = 2_000  # at the start
REMEMBERED_BYTES = 4 * 1024 * 1024
REACH_SECONDS = 0.5
REACH_POLL_SECONDS = 0.002
REACH_EVENT_SECONDS = 5.0  # for an event that the log is known to have: longer only while the database is away
MIN_LOOK_SECONDS = 0.02  # between two looks, however many hints come: strangers on the bus give hints, too
POLL_SECONDS_LOCAL = 0.03  # no shared bus: another process's events are only seen by looking
POLL_SECONDS_SHARED = 1.0
POLL_SECONDS_DEAF = 0.1
MAX_CONCURRENT_LOG_READS = 4
MAX_BACKOFF_SECONDS = 2.0

log = structlog.get_logger("feed")


class PositionTooOld(Exception):
    """The log no longer holds the event after this position."""


class Feed:
    """One per process."""

    def __init__(self, database: Database, *, has_shared_bus: bool, is_bus_deaf: Callable[[], bool]) -> None:
        self.head = Head("", 0)
        self.generation = 0  # counts logs: a position of one means nothing in the next
        self.ring = Ring()
        self.is_database_up = True
        self.log_reads = 0
        self.on_events: list[Callable[[Sequence[Event]], None]] = []
        self.on_reset: list[Callable[[str], None]] = []
        self._database = database
        self._has_shared_bus = has_shared_bus
        self._is_bus_deaf = is_bus_deaf
        self._pending: dict[int, Event] = {}
        self._pending_bytes = 0
        self._target = 0
        self._look = asyncio.Event()
        self._moved = asyncio.Event()  # replaced each time it is set
        self._present_look: asyncio.Task[None] | None = None
        self._next_look: asyncio.Task[None] | None = None
        self._behind = asyncio.Event()
        self._reading = asyncio.Semaphore(MAX_CONCURRENT_LOG_READS)

    async def start(self) -> None:
        """Take up the stream at the log's head. Raises Unavailable."""
        self.head = await event_log.head(self._database)
        self._target = self.head.seq
        await self._remember()

    async def _remember(self) -> None:
        """Fill the ring with the newest events: the clients of a worker that was replaced come here, all at once."""
        seq = await event_log.tail(self._database, max_rows=REMEMBERED_EVENTS, max_bytes=REMEMBERED_BYTES)
        while seq < self.head.seq:
            page = await self._read_log(seq, PAGE_EVENTS, PAGE_BYTES)
            if not page or (page[0].epoch, page[0].seq) != (self.head.epoch, seq + 1):
                self.ring.clear()  # another log, or one that was pruned meanwhile
                return
            for event in page:
                if event.seq <= self.head.seq:  # what was written meanwhile comes with the stream
                    self.ring.append(event)
            seq = page[-1].seq

    # --- what comes in

    def offer(self, events: Sequence[Event]) -> None:
        """Events heard on the bus, in any order."""
        ready: list[Event] = []
        for event in events:
            if event.epoch != self.head.epoch:
                self.look()
            elif event.seq == self.head.seq + 1:
                self._take(event, ready)
                self._take_pending(ready)
            elif event.seq > self.head.seq:
                self._keep(event)
        metrics.FEED_EVENTS_FROM_BUS.inc(len(ready))
        self._tell(ready)

    def hear_head(self, head: Head) -> None:
        """Somebody's place in the log."""
        if head.epoch != self.head.epoch:
            self.look()
        elif head.seq > self.head.seq:
            self._aim(head.seq)

    def look(self) -> None:
        """Read the log's head now: something may have been missed."""
        self._look.set()

    def _take(self, event: Event, ready: list[Event]) -> None:
        if self._pending and (kept := self._pending.pop(event.seq, None)) is not None:
            self._pending_bytes -= kept.size
        self.head = Head(event.epoch, event.seq)
        self.ring.append(event)
        ready.append(event)

    def _take_pending(self, ready: list[Event]) -> None:
        while (event := self._pending.get(self.head.seq + 1)) is not None:
            self._take(event, ready)

    def _keep(self, event: Event) -> None:
        self._aim(event.seq)
        has_room = len(self._pending) < PENDING_EVENTS and self._pending_bytes + event.size <= PENDING_BYTES
        if has_room and event.seq not in self._pending:
            self._pending[event.seq] = event
            self._pending_bytes += event.size

    def _aim(self, seq: int) -> None:
        self._target = max(self._target, seq)
        self._behind.set()

    def _tell(self, ready: Sequence[Event]) -> None:
        if ready:
            metrics.FEED_SEQ.set(self.head.seq)
            for listener in self.on_events:
                listener(ready)
            self._wake_waiting()

    def _wake_waiting(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    # --- the log

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch_head(), name="feed-head")
                tasks.create_task(self._fill_gaps(), name="feed-gaps")
        finally:
            looks = [look for look in (self._present_look, self._next_look) if look is not None]
            for look in looks:
                look.cancel()
            await asyncio.gather(*looks, return_exceptions=True)

    def _poll_seconds(self) -> float:
        if not self._has_shared_bus:
            return POLL_SECONDS_LOCAL
        return POLL_SECONDS_DEAF if self._is_bus_deaf() else POLL_SECONDS_SHARED

    async def _watch_head(self) -> None:
        backoff = POLL_SECONDS_DEAF
        while True:
            self._look.clear()
            seen = self.head
            try:
                found = await event_log.head(self._database)
            except Unavailable:
                self._database_went_away()
                await asyncio.sleep(backoff)
                backoff = min(backoff * 2, MAX_BACKOFF_SECONDS)
                continue
            backoff = POLL_SECONDS_DEAF
            self._database_came_back()
            if found.epoch != self.head.epoch:
                self._reset(found)
            elif found.epoch == seen.epoch and found.seq < seen.seq:
                await self._disown(seen)
            elif found.seq > self.head.seq:
                self._aim(found.seq)
            metrics.FEED_LAG.set(max(0, found.seq - self.head.seq))
            await asyncio.sleep(MIN_LOOK_SECONDS)
            try:
                async with asyncio.timeout(self._poll_seconds()):
                    await self._look.wait()
            except TimeoutError:
                pass

    async def _fill_gaps(self) -> None:
        backoff = POLL_SECONDS_DEAF
        while True:
            await self._behind.wait()
            self._behind.clear()
            if self.head.seq < self._target:
                await asyncio.sleep(GAP_GRACE_SECONDS)
            while self.head.seq < self._target:
                try:
                    await self._fill()
                    backoff = POLL_SECONDS_DEAF
                except Unavailable:
                    self._database_went_away()
                    await asyncio.sleep(backoff)
                    backoff = min(backoff * 2, MAX_BACKOFF_SECONDS)

    async def _fill(self) -> None:
        start = self.head
        events = await self._read_log(start.seq, PAGE_EVENTS, PAGE_BYTES)
        if self.head.epoch != start.epoch:
            return
        ready: list[Event] = []
        for event in events:
            if event.epoch == self.head.epoch and event.seq == self.head.seq + 1:
                self._take(event, ready)
        metrics.FEED_EVENTS_FROM_LOG.inc(len(ready))
        self._take_pending(ready)
        self._tell(ready)
        if not ready and self.head == start:
            await self._look_into_a_gap(start)

    async def _look_into_a_gap(self, start: Head) -> None:
        """Nothing follows where something must: late, pruned beyond us, or another log under the same name."""
        oldest = await event_log.oldest(self._database)
        found = await event_log.head(self._database)
        if self.head != start:
            return  # the bus was quicker
        if found.epoch != start.epoch:
            self._reset(found)
        elif found.seq < start.seq:
            await self._disown(start)
        elif oldest is not None and oldest > start.seq + 1:
            self._reset(found)
        elif oldest is None and found.seq > start.seq and await event_log.oldest(self._database) is None:
            # Read twice: between the first look and the head the log's first event may have been committed.
            self._reset(found)
        else:
            self._target = found.seq
            await asyncio.sleep(GAP_GRACE_SECONDS)

    async def _disown(self, seen: Head) -> None:
        """The log lost events that were seen: a backup was restored under a running service. Its numbers are given
        again, so positions from before it must not be taken for positions in it: it gets a new epoch.
        """
        try:
            await event_log.renew_epoch(self._database, seen.epoch)
        except Unavailable:
            return
        self.look()

    def _reset(self, found: Head) -> None:
        log.warning("another log", was=self.head.epoch, was_seq=self.head.seq, now=found.epoch, now_seq=found.seq)
        self.generation += 1
        self.head = found
        self._target = found.seq
        self._pending.clear()
        self._pending_bytes = 0
        self.ring.clear()
        for listener in self.on_reset:
            listener("the log was replaced")
        self._wake_waiting()

    def _database_went_away(self) -> None:
        if self.is_database_up:
            self.is_database_up = False
            log.warning("database unreachable; trying again")

    def _database_came_back(self) -> None:
        if not self.is_database_up:
            self.is_database_up = True
            log.info("database reachable again")

    async def _read_log(self, seq: int, max_events: int, max_bytes: int) -> list[Event]:
        async with self._reading:
            self.log_reads += 1
            metrics.LOG_READS.inc()
            return await event_log.read_after(self._database, seq, max_rows=max_events, max_bytes=max_bytes)

    # --- what goes out to those behind

    async def read_after(self, seq: int) -> list[Event]:
        """The next page after `seq`, from the ring or the log; empty at the head.

        Raises PositionTooOld when the log no longer reaches back to there, Unavailable when it cannot be read.
        """
        if seq >= self.head.seq:
            return []
        found = self.ring.after(seq, max_events=PAGE_EVENTS, max_bytes=PAGE_BYTES)
        if found is None:
            found = await self._read_log(seq, PAGE_EVENTS, PAGE_BYTES)
            # What is committed but not yet in this process's stream comes again with the stream.
            found = [event for event in found if event.seq <= self.head.seq]
        if not found or found[0].seq != seq + 1:
            raise PositionTooOld(seq)
        return found

    def newest_after(self, seq: int) -> list[Event] | None:
        """As `read_after`, from memory alone; None when that does not reach back so far."""
        if seq >= self.head.seq:
            return []
        return self.ring.after(seq, max_events=PAGE_EVENTS, max_bytes=PAGE_BYTES)

    async def wait_beyond(self, seq: int) -> None:
        """Wait until the stream has an event after `seq`, or is another log's. However many wait share one event."""
        generation = self.generation
        while self.head.seq <= seq and self.generation == generation:
            await self._moved.wait()

    async def reach(self, seq: int) -> None:
        """Wait until the stream has the event `seq`, which the log is known to have, or is another log's.

        Raises Unavailable when that takes too long.
        """
        self._aim(seq)
        try:
            async with asyncio.timeout(REACH_EVENT_SECONDS):
                await self.wait_beyond(seq - 1)
        except TimeoutError as error:
            raise Unavailable("The log cannot be read at the moment") from error

    async def reach_head(self) -> None:
        """Wait until the stream has every event that was committed when this was called, but not for long.

        So whoever writes and then connects does not find itself before its own write. All who ask at once share a look.
        """
        if self._next_look is None:
            self._next_look = asyncio.create_task(self._reach_head(self._present_look), name="feed-reach")
        done, _ = await asyncio.wait({self._next_look}, timeout=REACH_SECONDS)
        for look in done:
            if not look.cancelled():  # as it is when the feed ends
                look.result()

    async def _reach_head(self, present: asyncio.Task[None] | None) -> None:
        if present is not None:
            await asyncio.wait({present})
        self._present_look, self._next_look = self._next_look, None
        generation = self.generation
        try:
            found = await event_log.head(self._database)
        except Unavailable:
            return
        deadline = asyncio.get_running_loop().time() + REACH_SECONDS
        while self._is_before(found, generation):
            if asyncio.get_running_loop().time() > deadline:
                return
            self.hear_head(found)
            await asyncio.sleep(REACH_POLL_SECONDS)

    def _is_before(self, found: Head, generation: int) -> bool:
        if found.epoch == self.head.epoch:
            return self.head.seq < found.seq
        # After a reset, what was found may as well be of the log that was replaced.
        return self.generation == generation

    async def find_place(self, since: int | None, epoch: str | None) -> str | None:
        """Get ready to stream after `since`, or from now: why a stream cannot go on there, or None when it can.

        Raises Unavailable.
        """
        if since is None:
            await self.reach_head()
            return None
        if epoch is not None and epoch != self.head.epoch:
            await self.reach_head()  # this worker may be the last to know of a log that was replaced
            if epoch != self.head.epoch:
                return "another epoch"
        generation = self.generation
        reason = await self.check_position(since)
        if reason is not None:
            await self.reach_head()  # whoever starts over does not start before its own writes
        return "the log was replaced" if generation != self.generation else reason

    async def check_position(self, seq: int) -> str | None:
        """Why a stream cannot go on after `seq`, or None when it can. Raises Unavailable.

        A client that comes from another worker may be a little ahead of this one: its number counts as good once the
        log knows it.
        """
        if seq > self.head.seq:
            found = await event_log.head(self._database)
            if seq > found.seq:
                return "position is newer than the log"
            self._aim(found.seq)
            return None
        if seq == self.head.seq or self.ring.after(seq, max_events=1, max_bytes=1) is not None:
            return None
        oldest = await event_log.oldest(self._database)
        return "position is older than the log" if oldest is None or oldest > seq + 1 else None
