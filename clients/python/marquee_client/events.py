"""The values that the client hands to the application."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

Row: TypeAlias = Mapping[str, Any]  # An entity as GET returns it.
Key: TypeAlias = int | str  # The id of a row.


@dataclass(frozen=True, slots=True)
class Position:
    """A position in the event log: every event up to and including `seq` has been processed.

    `str()` and `parse` use the form of the header `Stream-Position`, `<epoch>:<seq>`.
    """

    epoch: str
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}:{self.seq}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """Return the position that `text` represents. Raises ValueError."""
        epoch, colon, seq = text.rpartition(":")
        if not colon or not epoch or not (seq.isascii() and seq.isdigit()):
            raise ValueError(f"expected <epoch>:<seq>, got {text!r}")
        return cls(epoch, int(seq))


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a subscription.

    `seq` is None for ephemeral events (`progress`). `reason` is "filter" when a row no longer matches the filter but
    still exists. `more`: another event with the same `seq` follows. `position`: where to resume after this event; if
    `more` is set, the position before the first event with this `seq`.
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
    """Events are missing because the server no longer has them: discard what you built from the watch.

    The next events are those after `position`.
    """

    operation: ClassVar[Literal["resync"]] = "resync"
    reason: str
    position: Position


@dataclass(frozen=True, slots=True)
class Change:
    """A change to a view. `reset`: any row may have changed, so read the view again."""

    kind: Literal["add", "update", "delete", "reset"]
    id: Key | None = None
    row: Row | None = None  # The row after the change.
    old: Row | None = None  # The row before the change.


@dataclass(frozen=True, slots=True)
class Response:
    """The response to a request, whatever its status."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)  # header names are in lowercase
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
