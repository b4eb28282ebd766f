"""What travels on the bus besides events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from repository.engine.events import Event, Head

HEARTBEAT_SECONDS = 0.5


log = structlog.get_logger("bus")


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A worker's place in the log."""

    worker: str
    head: Head


@dataclass(frozen=True, slots=True)
class Reconnected:
    """The mark after each (re)subscription: what was published before it may be lost."""


@dataclass(frozen=True, slots=True)
class Nudge:
    """Something that is no event has changed in the database: look now. Whoever misses it looks by the clock."""

    topic: str


Message = Sequence[Event] | Heartbeat | Reconnected | Nudge
