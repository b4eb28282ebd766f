"""The hub writes each event to every live subscription, once per group of equal ones.

Invariants:
- Every live subscription has been given every event up to `position` and none beyond; joining and leaving happen at
  that boundary only, after a flush.
- The hub never awaits a client: it writes, looks at what is unsent, and lets go of a socket that is full.
- Events that arrive in one turn of the loop go out in one write; a flush is due at once when they are many bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from realtime.frames import Frames
from realtime.subscription import MAX_UNSENT_BYTES, Spec, Subscription
from repository.event_log import Event

FLUSH_BYTES = 256 * 1024

log = structlog.get_logger("hub")


class Hub:
    """One per process; only used from its event loop."""

    def __init__(self) -> None:
        self.position = 0
        self._groups: dict[Spec, set[Subscription]] = {}
        self._pending: list[Event] = []
        self._pending_bytes = 0
        self._flush_due: asyncio.Handle | None = None

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def start(self, position: int) -> None:
        self.position = position

    def join(self, subscription: Subscription) -> None:
        """Make it live. Its position must be that of the feed."""
        self.flush()
        assert subscription.position == self.position, (subscription.position, self.position)
        subscription.is_live = True
        self._groups.setdefault(subscription.spec, set()).add(subscription)

    def leave(self, subscription: Subscription) -> None:
        self.flush()
        if subscription.is_live:
            self._release(subscription)
            subscription.position = self.position

    def _release(self, subscription: Subscription) -> None:
        subscription.is_live = False
        group = self._groups[subscription.spec]
        group.discard(subscription)
        if not group:
            del self._groups[subscription.spec]

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
        built: dict[object, Frames] = {}
        for spec, group in list(self._groups.items()):
            admitted = [event for event in events if spec.admits(event)]
            if not admitted:
                continue
            # Groups that differ in whom they admit mostly see the same events: build those bytes once.
            key = (spec.rendering, tuple(event.seq for event in admitted))
            frames = built.get(key)
            if frames is None:
                frames = built[key] = Frames(spec.texts(admitted))
            self._write(group, frames, before)

    def _write(self, group: set[Subscription], frames: Frames, before: int) -> None:
        """`before` is the place that a subscription keeps when writing to it fails."""
        behind: list[tuple[Subscription, int]] = []
        for subscription in group:
            try:
                subscription.stream.write(frames)
                if subscription.stream.buffered() > MAX_UNSENT_BYTES:
                    behind.append((subscription, self.position))
            except Exception as error:
                log.error("writing to a socket failed", exc_info=error)
                behind.append((subscription, before))
        for subscription, position in behind:
            self._release(subscription)
            subscription.fall_behind(position)

    def watches(self, topic: str) -> bool:
        """Whether anybody live watches the topic."""
        return any(topic in spec.topics for spec in self._groups)

    def send_ephemeral(self, topic: str, text: bytes) -> None:
        """A frame without a number, to whoever is live; those behind do not get it."""
        self.flush()
        frames = Frames([text])
        for spec, group in list(self._groups.items()):
            if topic in spec.topics:
                self._write(group, frames, self.position)

    def reset(self, reason: str, position: int) -> None:
        """Another log: everybody live is told to start over from `position`."""
        self.flush()
        self.position = position
        for group in list(self._groups.values()):
            for subscription in list(group):
                subscription.restart(reason)
