"""The events of the log in this process: every event once, in order, from the bus or from the log.

Invariants:
- Until a reset, `head` only moves to the next number. Listeners receive each number exactly once and in order.
- The bus only makes the feed faster. An event that arrives too early waits briefly for the events before it. If these
  do not arrive, or if the log's head turns out to be ahead, the missing events are read from the log.
- The log's head is polled, more often when there is no shared bus or the worker is deaf. A process without a working
  bus therefore lags, but misses no event.
- A new epoch means that the log was replaced: the `on_reset` listeners start over. A head that moved backwards, or
  another event with a number that the feed has passed on, means that the log has lost its newest events: the feed gives
  the log a new epoch. Each poll therefore also reads what identifies the event at the feed's head.
- `database.newest` learns every committed position that the feed learns.

`offer`, `offer_head` and `poll_now` never wait and may be called from anywhere in the event loop. Cancelling `run`
stops the feed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

import structlog

from core import metrics
from core.errors import Unavailable
from realtime.feed.ring import Ring
from repository.engine import event_log
from repository.engine.database import Database
from repository.engine.events import Event, Head

GAP_GRACE_SECONDS = 0.02  # concurrent commits may reach the bus out of order, by up to about GAP_GRACE_SECONDS
PENDING_EVENTS = 1_000
PENDING_BYTES = 8 * 1024 * 1024
PAGE_EVENTS = 500
PAGE_BYTES = 512 * 1024
REMEMBERED_EVENTS = 2_000  # the number of events that are loaded into the ring at start-up
REMEMBERED_BYTES = 4 * 1024 * 1024
REACH_SECONDS = 0.5
REACH_POLL_SECONDS = 0.002
REACH_EVENT_SECONDS = 5.0  # Reaching a known event takes longer than REACH_EVENT_SECONDS only in a database outage.
MIN_POLL_SECONDS = 0.02  # Polls need a minimum interval, because each event of another epoch calls `poll_now`.
POLL_SECONDS_LOCAL = 0.03  # Without a shared bus, another process's events are found only by polling.
POLL_SECONDS_SHARED = 1.0
POLL_SECONDS_DEAF = 0.1
MAX_CONCURRENT_LOG_READS = 4
MAX_BACKOFF_SECONDS = 2.0

log = structlog.get_logger("feed")


class PositionTooOld(Exception):
    """The log no longer holds the event after this position."""


class Feed:
    """One per process. `on_events` listeners receive the next events; `on_reset` listeners receive a new log's head."""

    def __init__(self, database: Database, *, has_shared_bus: bool, is_bus_deaf: Callable[[], bool]) -> None:
        self.head = Head("", 0)
        self.generation = 0  # increases when the log is replaced, because a position in the old log is then invalid
        self.ring = Ring()
        self.log_reads = 0
        self.on_events: list[Callable[[Sequence[Event]], None]] = []
        self.on_reset: list[Callable[[Head], None]] = []
        self.database = database
        self._has_shared_bus = has_shared_bus
        self._is_bus_deaf = is_bus_deaf
        self._is_database_up = True
        self._pending: dict[int, Event] = {}
        self._pending_bytes = 0
        self._conflict: str | None = None  # the epoch in which one number has belonged to two events
        self._mark: tuple[Head, event_log.Mark | None] | None = None  # for a head whose event the ring does not hold
        self._target = 0  # the highest number that is known to be in the log
        self._poll_due = asyncio.Event()
        self._moved = asyncio.Event()  # replaced by a new asyncio.Event each time it is set
        self._current_head_read: asyncio.Task[None] | None = None
        self._next_head_read: asyncio.Task[None] | None = None
        self._behind = asyncio.Event()
        self._reading = asyncio.Semaphore(MAX_CONCURRENT_LOG_READS)

    async def start(self) -> None:
        """Begin at the log's head. Raises Unavailable."""
        self.head = await event_log.head(self.database)
        self._target = self.head.seq
        self.database.newest.note(self.head)
        await self._load_ring()

    async def _load_ring(self) -> None:
        """Load the newest events into the ring, because all clients of the replaced worker reconnect together."""
        seq = await event_log.tail(self.database, max_rows=REMEMBERED_EVENTS, max_bytes=REMEMBERED_BYTES)
        while seq < self.head.seq:
            page = await self._read_log(seq)
            if not page or (page[0].epoch, page[0].seq) != (self.head.epoch, seq + 1):
                self.ring.clear()  # the log has been replaced or pruned in the meantime
                return
            for event in page:
                if event.seq <= self.head.seq:  # later events are appended when they are accepted
                    self.ring.append(event)
            seq = page[-1].seq

    # --- input

    def offer(self, events: Sequence[Event]) -> None:
        """Accept events from the bus, in any order."""
        ready: list[Event] = []
        for event in events:
            if event.epoch != self.head.epoch:
                self.poll_now()
            elif event.seq == self.head.seq + 1:
                self._accept(event, ready)
                self._accept_pending(ready)
            elif event.seq > self.head.seq:
                self._hold(event)
            else:
                self._compare(event)
        metrics.FEED_EVENTS_FROM_BUS.inc(len(ready))
        self._notify(ready)

    def offer_head(self, head: Head) -> None:
        """Accept a position that the log has reached, as reported by another worker or by the database."""
        if head.epoch != self.head.epoch:
            self.poll_now()
        elif head.seq > self.head.seq:
            self.database.newest.note(head)
            self._raise_target(head.seq)

    def poll_now(self) -> None:
        """Have `run` read the log's head now, because events may have been missed."""
        self._poll_due.set()

    def _accept(self, event: Event, ready: list[Event]) -> None:
        if (held := self._pending.pop(event.seq, None)) is not None:
            self._pending_bytes -= held.size
        self.head = Head(event.epoch, event.seq)
        self.ring.append(event)
        ready.append(event)

    def _accept_pending(self, ready: list[Event]) -> None:
        while (event := self._pending.get(self.head.seq + 1)) is not None:
            self._accept(event, ready)

    def _compare(self, event: Event) -> None:
        """Have the epoch renewed if the ring holds another event with this number."""
        known = self.ring.at(event.seq)
        if known is not None and known != event:
            self._conflict = event.epoch
            self.poll_now()

    def _is_replaced(self, seen: Head, mark: event_log.Mark | None) -> bool:
        """Return whether the log holds another event than the feed at `seen`, given the log's mark of that number."""
        if (event := self.ring.at(seen.seq)) is not None:
            self._mark = (seen, event_log.mark_of(event))
        elif self._mark is None or self._mark[0] != seen:
            self._mark = (seen, mark)
        return mark is not None and self._mark[1] is not None and mark != self._mark[1]

    def _hold(self, event: Event) -> None:
        self.database.newest.note(event)
        self._raise_target(event.seq)
        has_room = len(self._pending) < PENDING_EVENTS and self._pending_bytes + event.size <= PENDING_BYTES
        if has_room and event.seq not in self._pending:
            self._pending[event.seq] = event
            self._pending_bytes += event.size

    def _raise_target(self, seq: int) -> None:
        self._target = max(self._target, seq)
        self._behind.set()

    def _notify(self, ready: Sequence[Event]) -> None:
        if ready:
            self.database.newest.note(self.head)
            metrics.FEED_SEQ.set(self.head.seq)
            for listener in self.on_events:
                listener(ready)
            self._wake_waiters()

    def _wake_waiters(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    # --- the log

    async def run(self) -> None:
        """Poll the log's head and fill gaps until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch_head(), name="feed-head")
                tasks.create_task(self._fill_gaps(), name="feed-gaps")
        finally:
            reads = [read for read in (self._current_head_read, self._next_head_read) if read is not None]
            for read in reads:
                read.cancel()
            await asyncio.gather(*reads, return_exceptions=True)

    def _poll_seconds(self) -> float:
        if not self._has_shared_bus:
            return POLL_SECONDS_LOCAL
        return POLL_SECONDS_DEAF if self._is_bus_deaf() else POLL_SECONDS_SHARED

    async def _watch_head(self) -> None:
        backoff = POLL_SECONDS_DEAF
        while True:
            self._poll_due.clear()
            seen = self.head
            try:
                found, mark = await event_log.head_and_mark(self.database, seen.seq)
            except Unavailable:
                self._note_database(is_up=False)
                await asyncio.sleep(backoff)
                backoff = min(backoff * 2, MAX_BACKOFF_SECONDS)
                continue
            backoff = POLL_SECONDS_DEAF
            self._note_database(is_up=True)
            if found.epoch != self.head.epoch:
                self._reset(found)
            elif found.epoch == seen.epoch and (
                found.seq < seen.seq or found.epoch == self._conflict or self._is_replaced(seen, mark)
            ):
                await self._renew_epoch(seen)
            elif found.seq > self.head.seq:
                self._raise_target(found.seq)
            metrics.FEED_LAG.set(max(0, found.seq - self.head.seq))
            await asyncio.sleep(MIN_POLL_SECONDS)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_seconds()):
                    await self._poll_due.wait()

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
                    self._note_database(is_up=False)
                    await asyncio.sleep(backoff)
                    backoff = min(backoff * 2, MAX_BACKOFF_SECONDS)

    async def _fill(self) -> None:
        start = self.head
        events = await self._read_log(start.seq)
        if self.head.epoch != start.epoch:
            return
        ready: list[Event] = []
        for event in events:
            if event.epoch == self.head.epoch and event.seq == self.head.seq + 1:
                self._accept(event, ready)
        metrics.FEED_EVENTS_FROM_LOG.inc(len(ready))
        self._accept_pending(ready)
        self._notify(ready)
        if not ready and self.head == start:
            await self._resolve_gap(start)

    async def _resolve_gap(self, start: Head) -> None:
        """Find out why the event after `start` is missing (pruned, log replaced, or not committed); reset or wait."""
        oldest = await event_log.oldest(self.database)
        found = await event_log.head(self.database)
        if self.head != start:
            return  # the bus has delivered the event in the meantime
        if found.epoch != start.epoch:
            self._reset(found)
        elif found.seq < start.seq:
            await self._renew_epoch(start)
        elif oldest is not None and oldest > start.seq + 1:
            self._reset(found)
        elif oldest is None and found.seq > start.seq and await event_log.oldest(self.database) is None:
            # The condition reads the oldest event again: an event may have been committed between the reads above.
            self._reset(found)
        else:
            self._target = found.seq
            await asyncio.sleep(GAP_GRACE_SECONDS)

    async def _renew_epoch(self, seen: Head) -> None:
        """Give the log a new epoch, because it lost its newest events: a backup was restored while the service was
        running, or a database server took over without them. The numbers of the lost events will be used again, and a
        position in the old log must not be mistaken for one in the new log.
        """
        try:
            await event_log.renew_epoch(self.database, seen.epoch)
        except Unavailable:
            return
        self.poll_now()

    def _reset(self, found: Head) -> None:
        was = self.head
        log.warning("event log replaced", was=was.epoch, was_seq=was.seq, now=found.epoch, now_seq=found.seq)
        self.generation += 1
        self.head = found
        self.database.newest.note(found)
        self._target = found.seq
        self._pending.clear()
        self._pending_bytes = 0
        self.ring.clear()
        for listener in self.on_reset:
            listener(found)
        self._wake_waiters()

    def _note_database(self, *, is_up: bool) -> None:
        if is_up and not self._is_database_up:
            log.info("database connection restored")
        elif self._is_database_up and not is_up:
            log.warning("database connection lost; retrying")
        self._is_database_up = is_up

    async def _read_log(self, seq: int) -> list[Event]:
        async with self._reading:
            self.log_reads += 1
            metrics.LOG_READS.inc()
            return await event_log.read_after(self.database, seq, max_rows=PAGE_EVENTS, max_bytes=PAGE_BYTES)

    # --- readers that are behind

    async def read_after(self, seq: int) -> list[Event]:
        """Return the next page of events after `seq`, from the ring or the log. The page is empty at the head.

        Raises PositionTooOld when the log no longer reaches back that far, or Unavailable when the log cannot be read.
        """
        found = self.newest_after(seq)
        if found is None:
            # Events beyond `head` are left out, because the listeners have not received them yet.
            found = [event for event in await self._read_log(seq) if event.seq <= self.head.seq]
            if not found or found[0].seq != seq + 1:
                raise PositionTooOld(seq)
        return found

    def newest_after(self, seq: int) -> list[Event] | None:
        """Return the next page of events after `seq` from the ring: an empty page at the head, or None if the ring does
        not reach back to the event `seq + 1`.
        """
        if seq >= self.head.seq:
            return []
        return self.ring.after(seq, max_events=PAGE_EVENTS, max_bytes=PAGE_BYTES)

    async def wait_beyond(self, seq: int) -> None:
        """Wait until the feed has an event after `seq`, or until the log is replaced."""
        generation = self.generation
        while self.head.seq <= seq and self.generation == generation:
            await self._moved.wait()

    async def reach(self, seq: int) -> None:
        """Wait until the feed has the event `seq`, which the log is known to have, or until the log is replaced.

        Raises Unavailable after REACH_EVENT_SECONDS.
        """
        self._raise_target(seq)
        try:
            async with asyncio.timeout(REACH_EVENT_SECONDS):
                await self.wait_beyond(seq - 1)
        except TimeoutError as error:
            raise Unavailable("The log cannot be read at the moment") from error

    async def reach_head(self) -> None:
        """Wait, at most REACH_SECONDS, until the feed has every event that was committed at the time of the call.

        Thus a client that writes and then connects does not start before its own write. Concurrent callers share one
        read of the log's head.
        """
        if self._next_head_read is None:
            self._next_head_read = asyncio.create_task(self._reach_head(self._current_head_read), name="feed-reach")
        done, _ = await asyncio.wait({self._next_head_read}, timeout=REACH_SECONDS)
        for read in done:
            if not read.cancelled():  # when the feed stops, it cancels the read
                read.result()

    async def _reach_head(self, current: asyncio.Task[None] | None) -> None:
        if current is not None:
            await asyncio.wait({current})
        self._current_head_read, self._next_head_read = self._next_head_read, None
        generation, seen = self.generation, self.head
        try:
            found, mark = await event_log.head_and_mark(self.database, seen.seq)
        except Unavailable:
            return
        if seen.epoch == found.epoch == self.head.epoch and self._is_replaced(seen, mark):
            self.poll_now()
            return
        deadline = asyncio.get_running_loop().time() + REACH_SECONDS
        while self._is_before(found, generation):
            if asyncio.get_running_loop().time() > deadline:
                return
            self.offer_head(found)
            await asyncio.sleep(REACH_POLL_SECONDS)

    def _is_before(self, found: Head, generation: int) -> bool:
        if found.epoch == self.head.epoch:
            return self.head.seq < found.seq
        # After a reset, `found` may belong to the replaced log.
        return self.generation == generation
