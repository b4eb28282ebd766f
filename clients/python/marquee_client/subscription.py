"""One subscription across all its connections. Pure: no I/O.

Invariants:
- Everything up to `position` has been handed to the sink. The next connection resumes from there, so nothing is missed
  and nothing arrives twice.
- The events with the same `seq` (see `more`) are handed over together or, if the connection ends between them, not at
  all.
- A snapshot is handed over after its last page. Until then there is no position, and the next connection requests a new
  snapshot.
- Frames are handled only between the reply to `subscribe` and the end of the connection, and only under the name given
  in that `subscribe`. Every attempt uses a new name, so late frames of an earlier attempt are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .errors import MarqueeError, ProtocolViolation
from .events import Event, Position, Resync, Row, event_of

KNOWN = frozenset(("add", "update", "delete", "add_bulk", "update_bulk", "delete_bulk", "progress"))


@dataclass(frozen=True, slots=True)
class SubscribeOptions:
    """The members of `subscribe` that are the same on every connection."""

    topics: tuple[str, ...]
    filter: Mapping[str, Any] | None = None
    q: str | None = None
    snapshot: bool = False
    bulk: str | None = None
    deliver: str | Mapping[str, Any] | None = None


class Sink(Protocol):
    """The receiver of a subscription. None of these methods may block."""

    def began(self, position: Position) -> None:
        """Note that the server has accepted the subscription. The events after `position` will arrive."""

    def take(self, events: Sequence[Event], size: int) -> None:
        """Take all events with one `seq`, or one ephemeral event. `size`: the number of characters in their frames."""

    def resynced(self, resync: Resync) -> None:
        """Discard what was built from the events, because events are missing.

        If the subscription requests snapshots, `replaced` follows.
        """

    def replaced(self, rows: Sequence[Row], position: Position) -> None:
        """Replace all rows with `rows`, the complete rows as of `position`."""

    def failed(self, error: MarqueeError) -> None:
        """Note that the subscription has ended with an error."""


class Subscription:
    def __init__(self, options: SubscribeOptions, sink: Sink, since: Position | None = None) -> None:
        self.options = options
        self.sink = sink
        self.position = since
        self.is_paused = False  # whether the subscription is paused because its reader is too slow
        self._asked: Position | None = None
        self._is_accepted = False
        self._group: list[Event] = []
        self._group_size = 0
        self._rows: list[Row] = []
        self._rows_position: Position | None = None
        self._done: set[str] = set()

    @property
    def is_live(self) -> bool:
        """Whether the server has accepted the subscription and no snapshot is under way."""
        return self._is_accepted and self.position is not None

    def subscribe(self, name: str) -> dict[str, Any]:
        """Return the `subscribe` message, without an id."""
        self.cut()
        options, self._asked = self.options, self.position
        message: dict[str, Any] = {"action": "subscribe", "topics": list(options.topics), "as": name}
        if options.filter:
            message["filter"] = dict(options.filter)
        if options.q:
            message["q"] = options.q
        if options.snapshot:
            message["snapshot"] = True
        if options.bulk is not None:
            message["bulk"] = options.bulk
        if options.deliver is not None:
            message["deliver"] = dict(options.deliver) if isinstance(options.deliver, Mapping) else options.deliver
        if self.position is not None:
            message |= {"since": self.position.seq, "epoch": self.position.epoch}
        return message

    def accepted(self, seq: int, epoch: str) -> None:
        """Handle the reply to `subscribe`."""
        self._is_accepted = True
        if self._asked is not None:
            # The subscription resumes at this position. If the server cannot resume there, its next frame is `resync`.
            self.position = self._asked
            self.sink.began(self.position)
        elif not self.options.snapshot:
            self.position = Position(epoch, seq)
            self.sink.began(self.position)

    def cut(self) -> None:
        """Drop incomplete groups and snapshots when the connection or subscription ends. They will be sent again."""
        self._is_accepted = False
        self._drop_parts()

    def receive(self, frame: Mapping[str, Any], epoch: str, size: int) -> None:
        """Handle a frame of this subscription. Raises ProtocolViolation if the frames contradict each other."""
        if not self._is_accepted:
            return
        operation, seq = frame.get("operation"), frame.get("seq")
        if operation == "resync":
            self._resync(frame["data"])
        elif operation == "snapshot":
            self._page(frame, Position(epoch, frame["seq"]))
        elif isinstance(seq, int):
            self._event(frame, Position(epoch, seq), size)
        elif operation in KNOWN:
            self.sink.take([event_of(frame, self.position)], size)

    def _resync(self, data: Mapping[str, Any]) -> None:
        self._drop_parts()
        position = Position(data["epoch"], data["seq"])
        self.position = None if self.options.snapshot else position
        self.sink.resynced(Resync(str(data.get("reason", "")), position))

    def _page(self, frame: Mapping[str, Any], position: Position) -> None:
        if position != self._rows_position:
            self._drop_pages()  # a new snapshot replaces an unfinished one
            self._rows_position = position
        self._rows.extend(frame["data"]["items"])
        if frame["data"]["done"]:
            self._done.add(frame["topic"])
        if self._done.issuperset(self.options.topics):
            rows = self._rows
            self._drop_parts()
            self.position = position
            self.sink.replaced(rows, position)

    def _drop_parts(self) -> None:
        self._group, self._group_size = [], 0
        self._drop_pages()

    def _drop_pages(self) -> None:
        self._rows, self._rows_position, self._done = [], None, set()

    def _event(self, frame: Mapping[str, Any], position: Position, size: int) -> None:
        before = self.position
        if before is None or self._rows_position is not None:
            raise ProtocolViolation(4509, f"event {position.seq} arrived before the end of the snapshot")
        if position.seq <= before.seq:
            return  # the event was already handed over
        if self._group and self._group[0].seq != position.seq:
            begun = self._group[0].seq
            raise ProtocolViolation(4509, f"event {position.seq} arrived before the end of event {begun}")
        more = frame.get("more") is True
        self._group.append(event_of(frame, before if more else position))
        self._group_size += size
        if more:
            return
        group, size = [event for event in self._group if event.operation in KNOWN], self._group_size
        self._group, self._group_size = [], 0
        self.position = position
        if group:
            self.sink.take(group, size)
