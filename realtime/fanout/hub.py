"""The hub writes each event to every live subscription, once per group of equal ones.

Invariants:
- Every live subscription has been given every event up to `position` and none beyond; joining and leaving happen at
  that boundary only, after a flush.
- The hub never awaits a client: it writes, looks at what is unsent, and lets go of a socket that is full.
- Events that arrive in one turn of the loop go out in one write; a flush is due at once when they are many bytes.
- A filter is evaluated once per event, however many subscriptions share it, and only if its group can be concerned.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog

from core import metrics
from core.filters import Filter
from realtime.fanout import encode
from realtime.fanout.changes import changes_of, compiled, seen_texts
from realtime.fanout.matching import FilterIndex
from realtime.fanout.pulse import Pulse
from realtime.fanout.spec import Spec
from realtime.fanout.subscription import MAX_UNSENT_BYTES, Subscription
from realtime.wire.frames import Frames, Rendering, named
from realtime.wire.writer import HIGH_WATER_BYTES
from repository.engine.events import Event

FLUSH_BYTES = 256 * 1024

log = structlog.get_logger("hub")


class Hub:
    """One per process; only used from its event loop. `read` answers a page of the newest events after a number."""

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
        self._written: list[tuple[Frames, int]] = []  # in this flush, and to how many sockets

    def __len__(self) -> int:
        groups = (*self._plain.values(), *self._filtered.values())
        return sum(map(len, groups)) + sum(len(pulse.members) for pulse in self._pulses.values())

    def start(self, position: int) -> None:
        self.position = position

    # --- who is live

    def join(self, subscription: Subscription) -> None:
        """Make it live. Its position must be that of the feed."""
        self.flush()
        assert subscription.position == self.position, (subscription.position, self.position)
        subscription.is_live = True
        spec = subscription.spec
        if spec.latest_every_ms is not None:
            # Those that their last members left by themselves are of no more use.
            self._pulses = {interval: each for interval, each in self._pulses.items() if each.members}
            if spec.latest_every_ms not in self._pulses:
                self._pulses[spec.latest_every_ms] = Pulse(spec.latest_every_ms, self._read)
            self._pulses[spec.latest_every_ms].join(subscription)
        elif spec.filters:
            if spec not in self._filtered:
                self._filtered[spec] = set()
                self._enter_index(spec)
            self._filtered[spec].add(subscription)
        else:
            self._plain.setdefault(spec, set()).add(subscription)

    def leave(self, subscription: Subscription) -> None:
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
            self._pulses = {interval: each for interval, each in self._pulses.items() if each.members}
            return
        groups = self._filtered if spec.filters else self._plain
        group = groups[spec]
        group.discard(subscription)
        if not group:
            del groups[spec]
            if spec.filters:
                self._leave_index(spec)

    def _enter_index(self, spec: Spec) -> None:
        for topic, wanted in spec.filters:
            specs = self._by_filter.setdefault((topic, wanted), set())
            if not specs:
                self._indexes.setdefault(topic, FilterIndex()).add(wanted)
            specs.add(spec)

    def _leave_index(self, spec: Spec) -> None:
        for topic, wanted in spec.filters:
            specs = self._by_filter[topic, wanted]
            specs.discard(spec)
            if not specs:
                del self._by_filter[topic, wanted]
                self._indexes[topic].discard(wanted)
                if not self._indexes[topic]:
                    del self._indexes[topic]

    # --- what they are given

    def publish(self, events: Sequence[Event]) -> None:
        """The next events of the feed."""
        for event in events:
            self._pending.append(event)
            self._pending_bytes += len(event.payload)
            if self._pending_bytes >= FLUSH_BYTES:
                self.flush()
        if self._pending and self._flush_due is None:
            self._flush_due = asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
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
            # Groups that differ in whom they admit mostly see the same events: build those bytes once.
            key = (spec.rendering, tuple(event.seq for event in admitted))
            frames = built.get(key)
            if frames is None:
                try:
                    frames = built[key] = Frames(encode.texts(spec, admitted))
                except Exception as error:
                    log.error("an event cannot be shown", exc_info=error)
                    self._let_go([spec], before)
                    continue
            self._write(group, frames, before)

    def _flush_filtered(self, events: Sequence[Event], before: int) -> None:
        texts: dict[Spec, list[bytes]] = {}
        for event in events:
            index = self._indexes.get(event.topic)
            if index is None:
                continue
            try:
                changes = changes_of(event)
                for wanted, seen in index.judge(changes):
                    built: dict[str, Sequence[bytes]] = {}
                    for spec in self._by_filter[event.topic, wanted]:
                        if event.audience not in spec.audiences:
                            continue
                        bulk, name = spec.rendering.bulk, spec.rendering.subscription
                        if bulk not in built:
                            built[bulk] = seen_texts(event, bulk, seen, len(changes))
                        texts.setdefault(spec, []).extend(named(text, name) for text in built[bulk])
            except Exception as error:
                log.error("an event cannot be filtered", exc_info=error)
                failed = [spec for spec in self._filtered if event.topic in spec.topics]
                self._let_go(failed, before)
                for spec in failed:
                    texts.pop(spec, None)
        shared: dict[tuple[bytes, ...], Frames] = {}
        for spec, found in texts.items():
            if (group := self._filtered.get(spec)) is not None:
                # Different filters mostly see an event as what it is: join those bytes once.
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

    def _let_go(self, specs: Sequence[Spec], before: int) -> None:
        """They go on from `before` by themselves: nobody misses in silence what cannot be shown. They meet it again in
        their own tasks, which close what they cannot serve.
        """
        for spec in specs:
            groups = self._filtered if spec.filters else self._plain
            for subscription in list(groups.get(spec, ())):
                self._release(subscription)
                subscription.fall_behind(before)

    def _write(self, group: set[Subscription], frames: Frames, before: int) -> None:
        """`before` is the place that a subscription keeps when writing to it fails."""
        behind: list[tuple[Subscription, int]] = []
        self._written.append((frames, len(group)))
        for subscription in group:
            try:
                subscription.stream.write(frames)
                if subscription.stream.buffered() > MAX_UNSENT_BYTES:
                    behind.append((subscription, self.position))
            except Exception as error:
                log.error("writing to a socket failed", exc_info=error)
                behind.append((subscription, before))
        for subscription, position in behind:
            if subscription.is_live:
                self._release(subscription)
                subscription.fall_behind(position)

    # --- frames without a number

    def _live(self) -> list[tuple[Spec, list[Subscription]]]:
        groups = [(spec, list(group)) for spec, group in (*self._plain.items(), *self._filtered.items())]
        for pulse in self._pulses.values():
            by_spec: dict[Spec, list[Subscription]] = {}
            for member in pulse.members:
                by_spec.setdefault(member.spec, []).append(member)
            groups += by_spec.items()
        return groups

    def watches(self, topic: str) -> bool:
        """Whether anybody live watches the topic."""
        specs = (*self._plain, *self._filtered, *(each.spec for one in self._pulses.values() for each in one.members))
        return any(topic in spec.topics for spec in specs)

    def send_ephemeral(self, topic: str, row: Mapping[str, Any], build: Callable[[Rendering], bytes]) -> None:
        """A frame about a row, without a number, to whoever is live; those behind or still full do not get it."""
        self.flush()
        for spec, group in self._live():
            wanted = dict(spec.filters).get(topic)
            if topic in spec.topics and (wanted is None or compiled(wanted)(row)):
                text = Frames([build(spec.rendering)])
                for subscription in group:
                    if subscription.stream.buffered() <= HIGH_WATER_BYTES:
                        subscription.stream.write(text)

    def reset(self, reason: str, position: int) -> None:
        """Another log: everybody live is told to start over from `position`."""
        self.flush()
        self.position = position
        for _, group in self._live():
            for subscription in group:
                subscription.restart(reason)
