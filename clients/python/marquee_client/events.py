"""What arrives: values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

Row: TypeAlias = Mapping[str, Any]  # an entity as GET returns it
Key: TypeAlias = int | str  # its id


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the event log: everything up to and including `seq` is dealt with.

    `str()` and `parse` use the form of the header `Stream-Position`, `<epoch>:<seq>`.
    """

    epoch: str | None
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch or ''}:{self.seq}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """Raises ValueError."""
        epoch, colon, seq = text.rpartition(":")
        if not colon or not (seq.isascii() and seq.isdigit()):
            raise ValueError(f"expected <epoch>:<seq>, got {text!r}")
        return cls(epoch or None, int(seq))


@dataclass(frozen=True, slots=True)
class Event:
    """One frame of a subscription.

    `seq` is None for what is ephemeral (`progress`). `reason` is "filter" for a row that left the filter and exists
    still. `more`: another event with the same number follows. `position`: where a watch resumes that has dealt with
    this event and no later one; while `more` is set that is the place before the number.
    """

    operation: str
    topic: str | None
    seq: int | None
    data: Mapping[str, Any]
    position: Position | None = None
    changed: tuple[str, ...] = ()
    reason: str | None = None
    actor_id: int | None = None
    ts: str | None = None
    more: bool = False


@dataclass(frozen=True, slots=True)
class Resync:
    """In place of events that cannot be had any more: what was built from a watch is no good, start over.

    The events after `position` follow.
    """

    operation: ClassVar[Literal["resync"]] = "resync"
    reason: str
    position: Position


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to a view. `reset`: any row may be another than before; read the view anew."""

    kind: Literal["add", "update", "delete", "reset"]
    id: Key | None = None
    row: Row | None = None  # as it is now
    old: Row | None = None  # as it was


@dataclass(frozen=True, slots=True)
class Response:
    """The answer to a request, whatever its status."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)  # names in lower case
    body: Any = None


def event_of(frame: Mapping[str, Any], position: Position | None) -> Event:
    changed = frame.get("changed")
    return Event(
        operation=frame["operation"],
        topic=frame.get("topic"),
        seq=frame.get("seq"),
        data=frame.get("data") or {},
        position=position,
        changed=tuple(changed) if isinstance(changed, list) else (),
        reason=frame.get("reason"),
        actor_id=frame.get("actor_id"),
        ts=frame.get("ts"),
        more=frame.get("more") is True,
    )
