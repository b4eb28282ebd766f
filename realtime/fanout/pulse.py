"""The newest state of each entity, at most so often, for dashboards (`deliver: {"latest_every_ms": n}`).

Such a subscription is never given events one by one. At each beat of its pulse it gets what changed, in sum, since the
beat before: read from the ring, so nothing is kept per subscription but its place. Every state that it shows is one
that an event carried, hence one that was committed. A socket that is still full at a beat goes on at its own pace, as
any that is behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import structlog

from core import metrics
from realtime.fanout.changes import Change, changes_of
from realtime.fanout.encode import coalesce
from realtime.fanout.spec import Spec
from realtime.fanout.subscription import Subscription
from realtime.wire import frames
from realtime.wire.frames import Frames, Rendering
from realtime.wire.writer import HIGH_WATER_BYTES
from repository.engine.events import Event

PAGES_PER_BEAT = 2  # more than this behind, a subscription catches up at its own pace

log = structlog.get_logger("latest")


class Pulse:
    """All subscriptions that want the newest state every so many milliseconds."""

    def __init__(self, interval_ms: int, read: Callable[[int], list[Event] | None]) -> None:
        self.members: set[Subscription] = set()
        self._interval = interval_ms / 1000
        self._read = read
        self._timer: asyncio.TimerHandle | None = None

    def join(self, subscription: Subscription) -> None:
        self.members.add(subscription)
        self._wind()

    def leave(self, subscription: Subscription) -> None:
        self.members.discard(subscription)
        if not self.members and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wind(self) -> None:
        if self._timer is None and self.members:
            self._timer = asyncio.get_running_loop().call_later(self._interval, self._beat)

    def _beat(self) -> None:
        self._timer = None
        try:
            self._tell(list(self.members))
        finally:
            self._wind()

    def _tell(self, members: Sequence[Subscription]) -> None:
        decoded: dict[int, list[Change]] = {}

        def decode(event: Event) -> list[Change]:
            """Once for all who want different things of it."""
            if event.seq not in decoded:
                decoded[event.seq] = changes_of(event)
            return decoded[event.seq]

        windows: dict[tuple[Spec, int], tuple[list[bytes], int] | None] = {}
        built: dict[tuple[Spec, int, str | None], Frames] = {}
        for subscription in members:
            # The name makes no difference to what has changed.
            spec = replace(subscription.spec, rendering=Rendering(subscription.spec.rendering.bulk))
            start = subscription.position
            try:
                if (spec, start) not in windows:
                    windows[spec, start] = self._window(spec, start, decode)
                window = windows[spec, start]
                if window is None or subscription.stream.buffered() > HIGH_WATER_BYTES:
                    # Too much at once, or a socket that is still full: it goes on at its own pace.
                    self._let_go(subscription)
                    continue
                texts, subscription.position = window
                if not texts:
                    continue
                name = subscription.spec.rendering.subscription
                if (spec, start, name) not in built:
                    built[spec, start, name] = Frames([frames.named(text, name) for text in texts])
                found = built[spec, start, name]
                subscription.stream.write(found)
                metrics.HUB_DELIVERIES.inc(len(found.texts))
                metrics.HUB_BYTES.inc(found.size)
            except Exception as error:
                # The others go on; this one meets it again in its own task, which closes what it cannot serve.
                log.error("telling of a window failed", exc_info=error)
                subscription.position = start
                self._let_go(subscription)

    def _let_go(self, subscription: Subscription) -> None:
        self.members.discard(subscription)
        subscription.fall_behind(subscription.position)

    def _window(
        self, spec: Spec, start: int, decode: Callable[[Event], list[Change]]
    ) -> tuple[list[bytes], int] | None:
        """The frames since `start` and the new place, or None when there is too much for one beat."""
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
        return coalesce(spec, events, decode), position
