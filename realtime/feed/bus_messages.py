"""The messages of the bus: committed events, and what keeps workers in step without being events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from repository.engine.events import Event, Head

HEARTBEAT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A worker's position in the log. Workers recognise their own, and learn from the others when they are behind."""

    worker: str
    head: Head


@dataclass(frozen=True, slots=True)
class Reconnected:
    """The mark after each subscription to Redis: messages published before it may be lost. Stays in the process."""


@dataclass(frozen=True, slots=True)
class Nudge:
    """Something that is not an event has changed in the database; `topic` says what.

    A nudge may be lost: its receivers also poll.
    """

    topic: str


Message = Sequence[Event] | Heartbeat | Reconnected | Nudge
