"""A committed event, the head of the log, and the newest position that a process knows."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from core.errors import Unavailable


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


@dataclass(slots=True)
class Newest:
    """The newest position that this process knows to be committed, from its own writes or from the feed.

    While the lock on the log's head is held, no other write commits. So a head of the same epoch that is behind this
    position means that the database has lost the log's newest events. Only committed positions may be noted: the
    numbers of a transaction that is rolled back are used again.
    """

    epoch: str = ""
    seq: int = 0

    def note(self, position: Head | Event) -> None:
        if position.seq > self.seq or position.epoch != self.epoch:
            self.epoch, self.seq = position.epoch, position.seq

    def is_beyond(self, epoch: str, seq: int) -> bool:
        """Return whether the log had already gone beyond the number `seq` in this epoch."""
        return seq < self.seq and epoch == self.epoch


def new_epoch() -> str:
    """Return a random epoch."""
    return secrets.token_hex(8)


def head_of(rows: Sequence[Sequence[Any]]) -> Head:
    """Return the head of the log, from rows that begin with its epoch and its number.

    Raises Unavailable when there is no row, because the log has lost its head, or when the head has an unexpected type.
    """
    if not rows:
        raise Unavailable("The event log has no head")
    epoch, seq = rows[0][:2]
    if not (isinstance(epoch, str) and isinstance(seq, int)):
        raise Unavailable("The head of the event log has an unexpected type")
    return Head(epoch, seq)
