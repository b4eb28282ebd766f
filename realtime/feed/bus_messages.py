"""Bus messages: committed events, heartbeats, nudges, and a marker for a new subscription."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from repository.engine.events import Event, Head

HEARTBEAT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A worker's position in the log.

    A worker's own heartbeats show it that the bus works; the heartbeats of other workers show whether it is behind.
    """

    worker: str
    head: Head


@dataclass(frozen=True, slots=True)
class Reconnected:
    """A marker for a new subscription to Redis: earlier messages may have been lost. It never leaves the process."""


@dataclass(frozen=True, slots=True)
class Nudge:
    """A notice that something other than an event has changed in the database; `topic` names what has changed.

    A nudge may be lost, so its receivers also poll.
    """

    topic: str


Message = Sequence[Event] | Heartbeat | Reconnected | Nudge
