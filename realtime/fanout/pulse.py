"""The latest state of each row at a fixed interval, for dashboards (`deliver: {"latest_every_ms": n}`).

Rules:
- A subscription to the latest state does not receive every event. At each beat, it receives the net changes since the
  previous beat.
- Only a position is kept per subscription: at each beat, the events are read again from the ring.
- Every state that is sent comes from an event, so the state was committed.
- A beat goes on in slices if there are many subscriptions. The next beat follows an interval after its end.
- A subscription whose socket is still full at a beat leaves the pulse and catches up at its own pace, like any slow
  reader. So does a subscription whose filter exceeds the budget left in the current turn of the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import structlog

from core import metrics
from realtime.fanout.changes import Change, FilteredChange, changes_of, filter_changes, matcher_for
from realtime.fanout.costs import Budget, cost_of_event
from realtime.fanout.encode import Shared, coalesce
from realtime.fanout.slices import Slices
from realtime.fanout.spec import Spec
from realtime.fanout.subscription import Subscription
from realtime.wire import frames
from realtime.wire.frames import Frames, Rendering
from realtime.wire.writer import HIGH_WATER_BYTES
from repository.engine.events import Event

PAGES_PER_BEAT = 2  # a subscription that is more than PAGES_PER_BEAT pages behind catches up at its own pace

log = structlog.get_logger("latest")


@dataclass(frozen=True, slots=True)
class _Interval:
    """The frames of the changes between two beats, without a subscription's name, and the position after them."""

    texts: list[bytes]
    position: int


class Pulse:
    """The subscriptions that share one interval. `read` takes a position and returns the next page of events from the
    ring. `budget_of_turn` returns the filter budget of the current turn of the event loop. `on_detach` is called with
    each subscription that falls behind.
    """

    def __init__(
        self,
        interval_ms: int,
        read: Callable[[int], list[Event] | None],
        budget_of_turn: Callable[[], Budget],
        slices: Slices,
        on_detach: Callable[[Subscription], None],
    ) -> None:
        self.members: set[Subscription] = set()
        self._interval_seconds = interval_ms / 1000
        self._read = read
        self._budget_of_turn = budget_of_turn
        self._slices = slices
        self._on_detach = on_detach
        self._timer: asyncio.TimerHandle | None = None
        self._work: Generator[None, None, None] | None = None  # the current beat

    def join(self, subscription: Subscription) -> None:
        self.members.add(subscription)
        self._schedule()

    def leave(self, subscription: Subscription) -> None:
        self.members.discard(subscription)
        if not self.members and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def on_reset(self) -> None:
        """End the current beat, because its events belong to a log that was replaced."""
        if self._work is not None:
            self._work.close()
            self._work = None
            self._schedule()

    def _schedule(self) -> None:
        if self._timer is None and self._work is None and self.members:
            self._timer = asyncio.get_running_loop().call_later(self._interval_seconds, self._begin)

    def _begin(self) -> None:
        self._timer = None
        self._work = self._beat(list(self.members))
        self._slices.add(self._work)

    def _beat(self, members: Sequence[Subscription]) -> Generator[None, None, None]:
        try:
            yield from self._flush(members)
        except Exception as error:
            log.error("beat failed", exc_info=error)
        self._work = None
        self._schedule()

    def _flush(self, members: Sequence[Subscription]) -> Iterator[None]:
        decoded: Shared[list[Change]] = Shared()

        def decode(event: Event) -> list[Change]:
            """Decode an event once for all specs."""
            return decoded[event.seq] if event.seq in decoded else decoded.add(event.seq, changes_of(event), event.size)

        intervals: Shared[_Interval | None] = Shared()
        built: Shared[Frames] = Shared()
        for subscription in members:
            if subscription in self.members:  # it may have left
                self._write(subscription, decode, intervals, built)
            yield

    def _write(
        self,
        subscription: Subscription,
        decode: Callable[[Event], list[Change]],
        intervals: Shared[_Interval | None],
        built: Shared[Frames],
    ) -> None:
        # The name is left out, so that subscriptions that differ only in their name share an interval.
        spec = replace(subscription.spec, rendering=Rendering(subscription.spec.rendering.bulk))
        start = subscription.position
        try:
            if (spec, start) in intervals:
                interval = intervals[spec, start]
            else:
                interval = self._interval_after(start, spec, decode)
                intervals.add((spec, start), interval, sum(map(len, interval.texts)) if interval is not None else 0)
            if interval is None or subscription.writer.buffered() > HIGH_WATER_BYTES:
                self._detach(subscription)
                return
            subscription.position = interval.position
            if not interval.texts:
                return
            name = subscription.spec.rendering.subscription
            key = (spec, start, interval.position, name)
            if key in built:
                found = built[key]
            else:
                found = Frames([frames.named(text, name) for text in interval.texts])
                built.add(key, found, found.size)
            subscription.writer.write(found)
            metrics.HUB_DELIVERIES.inc(len(found.texts))
            metrics.HUB_BYTES.inc(found.size)
        except Exception as error:
            # The other members continue. This member retries in its own task, which closes the socket on failure.
            log.error("interval flush failed", exc_info=error)
            subscription.position = start
            self._detach(subscription)

    def _detach(self, subscription: Subscription) -> None:
        """Let the subscription catch up at its own pace."""
        self.members.discard(subscription)
        self._on_detach(subscription)
        subscription.fall_behind(subscription.position)

    def _interval_after(self, start: int, spec: Spec, decode: Callable[[Event], list[Change]]) -> _Interval | None:
        """Return the net changes after `start`, or None when they are too many or too costly for one beat."""
        events: list[Event] = []
        position = start
        for _ in range(PAGES_PER_BEAT):
            page = self._read(position)
            if page is None:
                return None
            if not page:
                break
            events += page
            position = page[-1].seq
        else:
            if self._read(position) != []:
                return None
        filters = dict(spec.filters)
        cost = sum(cost_of_event(filters.get(event.topic), event) for event in events if spec.admits(event))
        if not self._budget_of_turn().take(cost):
            return None

        def filtered(event: Event) -> list[FilteredChange]:
            return filter_changes(matcher_for(filters.get(event.topic)), decode(event))

        return _Interval(coalesce(spec, events, filtered), position)
