"""The hub writes each event to every live subscription, and builds frames once per group of equal specs.

Invariants:
- The hub has written every event up to `position`, and none beyond it, to each live subscription. Subscriptions join
  and leave at that boundary only, after a flush.
- The hub never awaits a client: it writes, checks how much is unsent, and detaches a subscription whose socket is full.
- Events that arrive in one turn of the event loop are sent in one write, or immediately when they reach FLUSH_BYTES.
- A filter is evaluated once per event, however many subscriptions share the filter, and only on events that can match.
- In one turn of the event loop, filters cost at most MAX_TESTS_PER_TURN. A group whose filter would exceed that budget
  falls behind, like a full socket: its filter is evaluated in slices, and the group becomes live again at the head.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog

from core import metrics
from core.filters import Filter
from realtime.fanout import encode
from realtime.fanout.changes import change_texts, changes_of, matcher_for
from realtime.fanout.costs import MAX_TESTS_PER_TURN, Budget
from realtime.fanout.matching import FilterIndex
from realtime.fanout.pulse import Pulse
from realtime.fanout.spec import Spec
from realtime.fanout.subscription import MAX_UNSENT_BYTES, Subscription
from realtime.feed.positions import LOG_REPLACED
from realtime.wire.frames import Frames, Rendering, named
from realtime.wire.writer import HIGH_WATER_BYTES
from repository.engine.events import Event, Head

FLUSH_BYTES = 256 * 1024

log = structlog.get_logger("hub")


class Hub:
    """One per process, used only from the event loop.

    `read` takes a position and returns the next page of events from the ring, or None when the ring does not reach
    back that far.
    """

    def __init__(self, read: Callable[[int], list[Event] | None]) -> None:
        self.position = 0
        self._read = read
        self._plain: dict[Spec, set[Subscription]] = {}
        self._filtered: dict[Spec, set[Subscription]] = {}
        self._by_filter: dict[tuple[str, Filter], set[Spec]] = {}
        self._indexes: dict[str, FilterIndex] = {}
        self._pulses: dict[int, Pulse] = {}
        self._pending: list[Event] = []
        self._pending_bytes = 0
        self._flush_due: asyncio.Handle | None = None
        self._budget = Budget(MAX_TESTS_PER_TURN)  # The filter budget of the current turn of the event loop.
        self._written: list[tuple[Frames, int]] = []  # What the current flush wrote, and to how many sockets.

    def __len__(self) -> int:
        groups = (*self._plain.values(), *self._filtered.values())
        return sum(map(len, groups)) + sum(len(pulse.members) for pulse in self._pulses.values())

    def start(self, position: int) -> None:
        """Begin after `position`. Must be called before any subscription joins."""
        self.position = position

    # --- membership

    def join(self, subscription: Subscription) -> None:
        """Make the subscription live. Its position must be the feed's head."""
        self.flush()
        assert subscription.position == self.position, (subscription.position, self.position)
        subscription.is_live = True
        spec = subscription.spec
        if spec.latest_every_ms is not None:
            # Idle pulses are removed here, because the hub does not notice when the last member falls behind.
            self._pulses = {interval: each for interval, each in self._pulses.items() if each.members}
            if spec.latest_every_ms not in self._pulses:
                self._pulses[spec.latest_every_ms] = Pulse(spec.latest_every_ms, self._read, self._budget_of_turn)
            self._pulses[spec.latest_every_ms].join(subscription)
        else:
            if spec not in self._groups_for(spec):
                self._index_filters(spec)
            self._groups_for(spec).setdefault(spec, set()).add(subscription)

    def leave(self, subscription: Subscription) -> None:
        """Write the pending events and release the subscription, whose position is then up to date."""
        self.flush()
        if subscription.is_live:
            if subscription.spec.latest_every_ms is None:
                subscription.position = self.position
            self._release(subscription)

    def _release(self, subscription: Subscription) -> None:
        subscription.is_live = False
        spec = subscription.spec
        if spec.latest_every_ms is not None:
            self._pulses[spec.latest_every_ms].leave(subscription)
            return
        groups = self._groups_for(spec)
        group = groups[spec]
        group.discard(subscription)
        if not group:
            del groups[spec]
            self._unindex_filters(spec)

    def _groups_for(self, spec: Spec) -> dict[Spec, set[Subscription]]:
        return self._filtered if spec.filters else self._plain

    def _index_filters(self, spec: Spec) -> None:
        for topic, wanted in spec.filters:
            specs = self._by_filter.setdefault((topic, wanted), set())
            if not specs:
                self._indexes.setdefault(topic, FilterIndex()).add(wanted)
            specs.add(spec)

    def _unindex_filters(self, spec: Spec) -> None:
        for topic, wanted in spec.filters:
            specs = self._by_filter[topic, wanted]
            specs.discard(spec)
            if not specs:
                del self._by_filter[topic, wanted]
                self._indexes[topic].discard(wanted)
                if not self._indexes[topic]:
                    del self._indexes[topic]

    # --- events

    def publish(self, events: Sequence[Event]) -> None:
        """Accept the feed's next events. The next flush writes them."""
        for event in events:
            self._pending.append(event)
            self._pending_bytes += len(event.payload)
            if self._pending_bytes >= FLUSH_BYTES:
                self.flush()
        if self._pending and self._flush_due is None:
            self._flush_due = asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Write the pending events to the live subscriptions that requested them."""
        if self._flush_due is not None:
            self._flush_due.cancel()
            self._flush_due = None
        if not self._pending:
            return
        events, self._pending, self._pending_bytes = self._pending, [], 0
        before, self.position = self.position, events[-1].seq
        self._flush_plain(events, before)
        if self._filtered:
            self._flush_filtered(events, before)
        self._count()

    def _flush_plain(self, events: Sequence[Event], before: int) -> None:
        built: dict[object, Frames] = {}
        for spec, group in list(self._plain.items()):
            admitted = [event for event in events if spec.admits(event)]
            if not admitted:
                continue
            # Groups with different audiences mostly receive the same events, so the bytes are built only once.
            key = (spec.rendering, tuple(event.seq for event in admitted))
            frames = built.get(key)
            if frames is None:
                try:
                    frames = built[key] = Frames(encode.texts(spec, admitted))
                except Exception as error:
                    log.error("event not encoded", exc_info=error)
                    self._detach([spec], before)
                    continue
            self._write(group, frames, before)

    def _budget_of_turn(self) -> Budget:
        """Return the filter budget of the current turn of the event loop."""
        if self._budget.left == MAX_TESTS_PER_TURN:
            asyncio.get_running_loop().call_soon(self._renew_budget)
        return self._budget

    def _renew_budget(self) -> None:
        self._budget = Budget(MAX_TESTS_PER_TURN)

    def _flush_filtered(self, events: Sequence[Event], before: int) -> None:
        texts: dict[Spec, list[bytes]] = {}
        budget = self._budget_of_turn()
        for event in events:
            index = self._indexes.get(event.topic)
            if index is None:
                continue
            try:
                changes = changes_of(event)
                size = len(event.payload) + len(event.before or b"")
                costly: list[Spec] = []
                for wanted, filtered in index.affected_filters(changes, size, budget):
                    if filtered is None:
                        costly += self._by_filter[event.topic, wanted]
                        continue
                    built: dict[str, Sequence[bytes]] = {}
                    for spec in self._by_filter[event.topic, wanted]:
                        if event.audience not in spec.audiences:
                            continue
                        bulk, name = spec.rendering.bulk, spec.rendering.subscription
                        if bulk not in built:
                            built[bulk] = change_texts(event, bulk, filtered, len(changes))
                        texts.setdefault(spec, []).extend(named(text, name) for text in built[bulk])
                if costly:
                    metrics.COSTLY_FILTERS.inc(len(costly))
                    self._detach(costly, before)
                    for spec in costly:
                        texts.pop(spec, None)
            except Exception as error:
                log.error("event not filtered", exc_info=error)
                failed = [spec for spec in self._filtered if event.topic in spec.topics]
                self._detach(failed, before)
                for spec in failed:
                    texts.pop(spec, None)
        shared: dict[tuple[bytes, ...], Frames] = {}
        for spec, found in texts.items():
            if (group := self._filtered.get(spec)) is not None:
                # Most filters that an event affects let the whole event pass, so its bytes are joined only once.
                key = tuple(found)
                frames = shared.get(key)
                if frames is None:
                    frames = shared[key] = Frames(key)
                self._write(group, frames, before)

    def _count(self) -> None:
        written, self._written = self._written, []
        metrics.HUB_FRAMES.inc(sum(len(frames.texts) for frames, _ in written))
        metrics.HUB_DELIVERIES.inc(sum(len(frames.texts) * sockets for frames, sockets in written))
        metrics.HUB_BYTES.inc(sum(frames.size * sockets for frames, sockets in written))

    def _detach(self, specs: Sequence[Spec], before: int) -> None:
        """Detach these groups at the position `before`. Each subscription continues in its own task, which evaluates a
        costly filter in slices. The task closes the socket if an event cannot be encoded, so that no client misses an
        event without noticing.
        """
        for spec in specs:
            for subscription in list(self._groups_for(spec).get(spec, ())):
                self._release(subscription)
                subscription.fall_behind(before)

    def _write(self, group: set[Subscription], frames: Frames, before: int) -> None:
        """Write to every member. A member whose write fails is detached at the position `before`; a member whose buffer
        or room is full is detached at the position after this flush.
        """
        behind: list[tuple[Subscription, int]] = []
        self._written.append((frames, len(group)))
        for subscription in group:
            try:
                subscription.writer.write(frames)
                size = subscription.writer.buffered()
                if size > MAX_UNSENT_BYTES or (size > HIGH_WATER_BYTES and subscription.room.is_full()):
                    behind.append((subscription, self.position))
            except Exception as error:
                log.error("socket write failed", exc_info=error)
                behind.append((subscription, before))
        for subscription, position in behind:
            if subscription.is_live:
                self._release(subscription)
                subscription.fall_behind(position)

    # --- ephemeral frames

    def _members(self) -> list[tuple[Spec, list[Subscription]]]:
        groups = [(spec, list(group)) for spec, group in (*self._plain.items(), *self._filtered.items())]
        for pulse in self._pulses.values():
            by_spec: dict[Spec, list[Subscription]] = {}
            for member in pulse.members:
                by_spec.setdefault(member.spec, []).append(member)
            groups += by_spec.items()
        return groups

    def has_subscribers(self, topic: str) -> bool:
        """Return whether any live subscription includes the topic."""
        specs = (*self._plain, *self._filtered, *(each.spec for one in self._pulses.values() for each in one.members))
        return any(topic in spec.topics for spec in specs)

    def send_ephemeral(self, topic: str, row: Mapping[str, Any], build: Callable[[Rendering], bytes]) -> None:
        """Write an unnumbered frame to the live subscriptions that match `row`, except those whose socket is full."""
        self.flush()
        for spec, group in self._members():
            if topic in spec.topics and matcher_for(dict(spec.filters).get(topic))(row):
                text = Frames([build(spec.rendering)])
                for subscription in group:
                    if subscription.writer.buffered() <= HIGH_WATER_BYTES:
                        subscription.writer.write(text)

    def on_reset(self, head: Head) -> None:
        """Restart every live subscription at the head of the log that replaced the previous one."""
        self.flush()
        self.position = head.seq
        for _, group in self._members():
            for subscription in group:
                subscription.restart(LOG_REPLACED)
