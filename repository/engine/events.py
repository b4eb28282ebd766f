"""A committed event and the head of the log, as values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """A committed event. `payload` and `before` are encoded JSON, shared by the log, the bus and the sockets.

    `before` holds the deleted row, or only the former values of the changed fields of an updated row. For a bulk
    operation, `before` is a list with such an entry for each row.
    """

    epoch: str
    seq: int
    topic: str
    operation: str
    entity_id: str | None
    audience: str
    payload: bytes
    before: bytes | None
    changed: tuple[str, ...]
    actor_id: int | None
    created_at: str
    # Parts of frames built for this event, keyed by what they depend on (`realtime.wire.frames`).
    built: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def size(self) -> int:
        """The approximate size in memory, in bytes."""
        return len(self.payload) + (len(self.before) if self.before else 0) + 512


@dataclass(frozen=True, slots=True)
class Head:
    """The log's identity and its newest number."""

    epoch: str
    seq: int
