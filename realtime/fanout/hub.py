"""The hub writes each event to every live subscription, and builds frames once per group of equal specs.

Invariants:
- The hub delivers the events in batches, one after another. The batch that is being delivered ends at `position`. Every
  live subscription has received all events up to `position`, except the groups in `_waiting` and the subscriptions in
  `_unwritten`: these have received all events up to `_before`. No live subscription has received any later event.
- Delivery takes many turns of the event loop if there are many subscriptions (`realtime.fanout.slices`). Meanwhile, a
  subscription may leave: its position is that of the last event that was written to it. A subscription that joins is
  not live in the middle of a batch: it waits until the hub has reached its position.
- The hub keeps no events. Each batch holds what the ring has after `position`, up to FLUSH_BYTES: events that arrive in
  one turn of the event loop, or while others are being delivered, are sent in one write. If the ring no longer has the
  next event, the hub reads it from the log, once for all subscriptions.
- The hub never awaits a client: it checks how much is unsent, and detaches a subscription whose socket is full.
- A filter is evaluated once per event, however many subscriptions share the filter, and only on events that can match.
- In one turn of the event loop, filters cost at most MAX_TESTS_PER_TURN. A group whose filter would exceed that budget
  falls behind, like a full socket: its filter is evaluated in slices, and the group becomes live again at the head.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Generator, Hashable, Iterator, Mapping, MutableMapping, Sequence
from itertools import islice
from typing import Any

import structlog

from core import metrics
from core.errors import Unavailable
from realtime.fanout.changes import changes_of
from realtime.fanout.costs import MAX_TESTS_PER_TURN, Budget
from realtime.fanout.encode import Built, Counted, Ephemeral, Part
from realtime.fanout.groups import Groups
from realtime.fanout.pulse import Pulse
from realtime.fanout.slices import Slices
from realtime.fanout.spec import Spec
from realtime.fanout.subscription import Subscription
from realtime.feed.feed import Feed, PositionTooOld
from realtime.feed.positions import LOG_REPLACED
from realtime.wire.frames import Frames, Rendering
from realtime.wire.writer import HIGH_WATER_BYTES
from repository.engine.events import Event, Head

FLUSH_BYTES = 256 * 1024
BYTES_PER_STEP = 64 * 1024  # The clock is read after about BYTES_PER_STEP have been written, or WRITES_PER_STEP writes.
WRITES_PER_STEP = 64
RETRY_SECONDS = 0.1

log = structlog.get_logger("hub")


class Hub:
    """One per process, used only from the event loop. `run` reads the log when the ring is too short."""

    def __init__(self, feed: Feed) -> None:
        self.position = 0
        self._feed = feed
        self._head = 0  # the number of the newest published event
        self._groups = Groups()
        self._pulses: dict[int, Pulse] = {}
        # The live subscriptions whose position the hub has yet to reach, in the order of their positions.
        self._joining: OrderedDict[Subscription, None] = OrderedDict()
        self._topics: Counter[str] = Counter()  # the number of live subscriptions with each topic
        self._before = 0
        self._waiting: set[Spec] = set()
        self._unwritten: set[Subscription] = set()
        self._ephemerals: dict[tuple[str, Hashable], Ephemeral] = {}
        self._slices = Slices()
        self._work: Generator[None, None, None] | None = None  # the delivery in progress
        self._needs_log = asyncio.Event()  # set while the hub waits for `run` to read the log
        self._budget = Budget(MAX_TESTS_PER_TURN)  # The filter budget of the current turn of the event loop.
        self._counted = Counted()
        self._failure: Exception | None = None  # why the delivery ended

    def __len__(self) -> int:
        """Return the number of live subscriptions."""
        return len(self._groups) + len(self._joining) + sum(len(pulse.members) for pulse in self._pulses.values())

    @property
    def is_idle(self) -> bool:
        """Whether every live subscription has received every published event."""
        return self._work is None and self.position == self._head

    def start(self, position: int) -> None:
        """Begin after `position`. Must be called before any subscription joins."""
        self.position = self._head = position

    # --- membership

    def join(self, subscription: Subscription) -> None:
        """Make the subscription live. Its position must be the feed's head."""
        assert subscription.position >= self.position, (subscription.position, self.position)
        subscription.is_live = True
        spec = subscription.spec
        self._topics.update(spec.topics)
        if spec.latest_every_ms is not None:
            # Idle pulses are removed here, because the hub does not notice when the last member falls behind.
            self._pulses = {interval: each for interval, each in self._pulses.items() if each.members}
            if spec.latest_every_ms not in self._pulses:
                read, interval = self._feed.newest_after, spec.latest_every_ms
                self._pulses[interval] = Pulse(interval, read, self._budget_of_turn, self._slices, self._detached)
            self._pulses[spec.latest_every_ms].join(subscription)
        elif self._work is None and subscription.position == self.position:
            self._groups.add(subscription)
        else:
            self._joining[subscription] = None
            self._continue()

    def leave(self, subscription: Subscription) -> None:
        """Release the subscription, and set its position to that of the last event that was written to it."""
        if not subscription.is_live:
            return
        if subscription in self._joining:
            del self._joining[subscription]
        elif subscription.spec.latest_every_ms is not None:
            self._pulses[subscription.spec.latest_every_ms].leave(subscription)
        else:
            subscription.position = self._position_of(subscription)
            self._groups.discard(subscription)
            self._unwritten.discard(subscription)
        self._detached(subscription)

    def _position_of(self, subscription: Subscription) -> int:
        is_due = subscription.spec in self._waiting or subscription in self._unwritten
        return self._before if is_due else self.position

    def _detached(self, subscription: Subscription) -> None:
        subscription.is_live = False
        self._topics.subtract(subscription.spec.topics)

    def _fall_behind(self, subscription: Subscription, position: int) -> None:
        self._groups.discard(subscription)
        self._detached(subscription)
        subscription.fall_behind(position)

    # --- events

    def publish(self, events: Sequence[Event]) -> None:
        """Accept the feed's next events, which the ring holds already. Their delivery begins in the next turn."""
        self._head = events[-1].seq
        self._continue()

    def _continue(self) -> None:
        if self._work is None and not self._needs_log.is_set():
            self._begin(self._deliver_all())

    def _begin(self, work: Iterator[None]) -> None:
        self._work = self._guarded(work)
        self._slices.add(self._work)

    def _guarded(self, work: Iterator[None]) -> Generator[None, None, None]:
        try:
            yield from work
            self._work = None
        except Exception as error:  # noqa: BLE001 (`run` raises the error)
            self._failure = error
            self._needs_log.set()

    def _deliver_all(self) -> Iterator[None]:
        """Deliver the published events that the ring holds."""
        while True:
            yield from self._send_ephemerals()
            yield from self._admit()
            if self.position < self._head:
                page = self._feed.newest_after(self.position)
                if page is None:
                    self._needs_log.set()
                    return
                yield from self._deliver(page)
            elif not self._ephemerals:
                return

    async def run(self) -> None:
        """Read from the log what the ring no longer holds, until cancelled. Raise the error if the delivery failed."""
        while True:
            await self._needs_log.wait()
            if self._failure is not None:
                raise self._failure
            generation = self._feed.generation
            try:
                page = await self._feed.read_after(self.position)
            except Unavailable:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            except PositionTooOld:
                page = []
            if generation == self._feed.generation:
                self._needs_log.clear()
                self._begin(self._continue_with(page))

    def _continue_with(self, page: Sequence[Event]) -> Iterator[None]:
        """Deliver a page of the log. If it is empty, the log no longer has the next event: each subscription finds this
        out in its own task.
        """
        if page:
            yield from self._deliver(page)
        else:
            yield from self._detach(self._groups.specs())
            self.position = next(iter(self._joining)).position if self._joining else self._head
        yield from self._deliver_all()

    def _admit(self) -> Iterator[None]:
        """Add the subscriptions whose position the hub has reached. When this ends, there are none."""
        while self._joining:
            subscription = next(iter(self._joining))
            if subscription.position > self.position:
                return
            del self._joining[subscription]
            self._groups.add(subscription)
            yield

    def _deliver(self, page: Sequence[Event]) -> Iterator[None]:
        """Write the next batch, which is the beginning of a page, to the live subscriptions that requested it."""
        events = self._batch(page)
        self._before, self.position = self.position, events[-1].seq
        self._waiting.update(self._groups.specs())
        try:
            yield from self._deliver_plain(events)
            if self._groups.filtered:
                yield from self._deliver_filtered(events)
        except Exception as error:
            log.error("events not delivered", exc_info=error)
            yield from self._detach(self._waiting)
            for subscription in list(self._unwritten):
                self._fall_behind(subscription, self._before)
        finally:
            self._waiting.clear()
            self._unwritten.clear()
            self._counted.report()

    def _batch(self, page: Sequence[Event]) -> Sequence[Event]:
        until = next(iter(self._joining)).position if self._joining else self._head
        size = 0
        for number, event in enumerate(page, 1):
            size += len(event.payload)
            if event.seq == until or size >= FLUSH_BYTES:
                return page[:number]
        return page

    def _deliver_plain(self, events: Sequence[Event]) -> Iterator[None]:
        built = Built()
        for spec in list(self._groups.plain):
            if admitted := [event for event in events if spec.admits(event)]:
                try:
                    frames = built.frames_of(spec.rendering, admitted)
                except Exception as error:
                    log.error("event not encoded", exc_info=error)
                    yield from self._detach([spec])
                else:
                    yield from self._write(spec, frames)
            self._waiting.discard(spec)
            yield

    def _budget_of_turn(self) -> Budget:
        """Return the filter budget of the current turn of the event loop."""
        if self._budget.left == MAX_TESTS_PER_TURN:
            asyncio.get_running_loop().call_soon(self._renew_budget)
        return self._budget

    def _renew_budget(self) -> None:
        self._budget = Budget(MAX_TESTS_PER_TURN)

    def _deliver_filtered(self, events: Sequence[Event]) -> Iterator[None]:
        found: dict[Spec, list[Part]] = {}
        for event in events:
            if self._groups.has_filters(event.topic):
                try:
                    yield from self._filter(event, found)
                except Exception as error:
                    log.error("event not filtered", exc_info=error)
                    failed = [spec for spec in self._groups.filtered if event.topic in spec.topics]
                    yield from self._detach(failed, found)
        self._waiting.intersection_update(found)
        built = Built()
        for spec, parts in found.items():
            try:
                frames = built.frames_of_parts(spec.rendering, parts)
            except Exception as error:
                log.error("event not encoded", exc_info=error)
                yield from self._detach([spec])
            else:
                yield from self._write(spec, frames)
            yield

    def _filter(self, event: Event, found: MutableMapping[Spec, list[Part]]) -> Iterator[None]:
        """Add, for each spec whose filter an event affects, what the event means for the filter."""
        changes = changes_of(event)
        yield
        budget = self._budget_of_turn()
        for wanted, filtered, specs in self._groups.affected_filters(event, changes, budget):
            if filtered is None:
                metrics.COSTLY_FILTERS.inc(len(specs))
                yield from self._detach(specs, found)
            else:
                part = Part(event, wanted, filtered, len(changes))
                for spec in specs:
                    if event.audience in spec.audiences:
                        found.setdefault(spec, []).append(part)
            yield

    def _detach(self, specs: Collection[Spec], found: MutableMapping[Spec, list[Part]] | None = None) -> Iterator[None]:
        """Detach these groups, and forget what was `found` for them. Each subscription continues in its own task, which
        evaluates a costly filter in slices. The task closes the socket if an event cannot be encoded, so that no client
        misses an event without noticing.
        """
        for spec in list(specs):
            if found is not None:
                found.pop(spec, None)
            for subscription in self._groups.members(spec):
                if subscription in self._groups:  # it may have left
                    self._fall_behind(subscription, self._position_of(subscription))
                yield

    def _write(self, spec: Spec, frames: Frames) -> Iterator[None]:
        """Write to every member of a group. A member whose socket is full, or fails, falls behind."""
        unwritten = self._unwritten = self._groups.members(spec)
        self._waiting.discard(spec)
        self._counted.add(frames, len(unwritten))
        step = max(1, min(WRITES_PER_STEP, BYTES_PER_STEP // max(1, frames.size)))
        has_room = HIGH_WATER_BYTES - frames.size
        while unwritten:
            some = list(islice(unwritten, step))
            unwritten.difference_update(some)
            for subscription in some:
                writer = subscription.writer
                try:
                    size = writer.buffered()
                    if size <= has_room:
                        writer.write(frames)
                    elif size > HIGH_WATER_BYTES and subscription.is_full(size):
                        self._fall_behind(subscription, self._before)
                    else:
                        writer.write(frames)
                        if subscription.is_full(writer.buffered()):
                            self._fall_behind(subscription, self.position)
                except Exception as error:
                    log.error("socket write failed", exc_info=error)
                    self._fall_behind(subscription, self._before)
            yield

    # --- ephemeral frames

    def has_subscribers(self, topic: str) -> bool:
        """Return whether any live subscription includes the topic."""
        return self._topics[topic] > 0

    def send_ephemeral(self, topic: str, row: Mapping[str, Any], build: Callable[[Rendering], bytes]) -> None:
        """Write an unnumbered frame to the live subscriptions that match `row`, except those whose socket is full.

        The frame follows the published events. It replaces an earlier frame about the row that has not been sent yet.
        """
        self._ephemerals.pop((topic, row["id"]), None)
        self._ephemerals[topic, row["id"]] = Ephemeral(self._head, topic, row, build)
        self._continue()

    def _send_ephemerals(self) -> Iterator[None]:
        while self._ephemerals:
            key, ephemeral = next(iter(self._ephemerals.items()))
            if ephemeral.position > self.position:
                return
            del self._ephemerals[key]
            latest = [each for pulse in self._pulses.values() for each in pulse.members]
            try:
                for spec in self._groups.specs():
                    yield from self._send_ephemeral(ephemeral, spec, self._groups.members(spec))
                for each in latest:
                    yield from self._send_ephemeral(ephemeral, each.spec, {each})
            except Exception as error:
                log.error("ephemeral frame not sent", exc_info=error)

    def _send_ephemeral(self, ephemeral: Ephemeral, spec: Spec, members: Collection[Subscription]) -> Iterator[None]:
        yield
        if ephemeral.is_for(spec):
            text = Frames([ephemeral.build(spec.rendering)])
            for subscription in members:
                if subscription.is_live and subscription.writer.buffered() <= HIGH_WATER_BYTES:
                    subscription.writer.write(text)
                yield

    # --- another log

    def on_reset(self, head: Head) -> None:
        """Restart every live subscription at the head of the log that replaced the previous one."""
        if self._work is not None:
            self._work.close()
            self._work = None
        self._needs_log.clear()
        self._ephemerals.clear()
        self.position = self._head = head.seq
        for subscription in self._joining:
            self._groups.add(subscription)
        self._joining.clear()
        members = [each for spec in self._groups.specs() for each in self._groups.members(spec)]
        for pulse in self._pulses.values():
            pulse.on_reset()
            members += pulse.members
        for subscription in members:
            subscription.restart(LOG_REPLACED)
