"""The messages of the bus: committed events, heartbeats, nudges and the mark of a new subscription."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from repository.engine.events import Event, Head

HEARTBEAT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A worker's position in the log. A worker recognises its own; from the others it learns whether it is behind."""

    worker: str
    head: Head


@dataclass(frozen=True, slots=True)
class Reconnected:
    """The mark of a new subscription to Redis: earlier messages may have been lost. It never leaves the process."""


@dataclass(frozen=True, slots=True)
class Nudge:
    """Something that is not an event has changed in the database; `topic` says what.

    A nudge may be lost: its receivers also poll.
    """

    topic: str


Message = Sequence[Event] | Heartbeat | Reconnected | Nudge
