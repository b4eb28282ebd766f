"""The frames of a run of events for one spec.

`texts` serves subscriptions without a filter. `coalesce` serves subscriptions that want the latest state at an
interval: it keeps the net effect on each row, so that a row that was added and deleted within the run is not sent.
`Built` builds what the hub writes, once for all groups that receive the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from core import metrics
from core.filters import Filter, Row
from realtime.fanout.changes import BY_FILTER, FilteredChange, change_texts, is_whole, matcher_for
from realtime.fanout.spec import Spec
from realtime.wire import data, frames
from realtime.wire.frames import Frames, Rendering
from repository.engine.events import Event
from repository.engine.transaction import MAX_EVENT_BYTES, MAX_EVENT_ITEMS

MAX_SHARED_BYTES = 8 * 1024 * 1024

V = TypeVar("V")


class Shared(Generic[V]):
    """Values that were built for one subscription and serve others, too. Beyond MAX_SHARED_BYTES, all are dropped."""

    def __init__(self) -> None:
        self._values: dict[Hashable, V] = {}
        self._size = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def __getitem__(self, key: Hashable) -> V:
        return self._values[key]

    def add(self, key: Hashable, value: V, size: int) -> V:
        if self._size + size > MAX_SHARED_BYTES:
            self._values.clear()
            self._size = 0
        self._values[key] = value
        self._size += size
        return value


class Part(NamedTuple):
    """The changes of an event that pass a filter. `total` is the number of all its changes."""

    event: Event
    wanted: Filter
    changes: Sequence[FilteredChange]
    total: int


class Ephemeral(NamedTuple):
    """An unnumbered frame about a row, which is sent after the event `position`."""

    position: int
    topic: str
    row: Mapping[str, Any]
    build: Callable[[Rendering], bytes]

    def is_for(self, spec: Spec) -> bool:
        return self.topic in spec.topics and matcher_for(dict(spec.filters).get(self.topic))(self.row)


@dataclass(slots=True)
class Counted:
    """Counts frames for the metrics, which are updated once for all of a batch."""

    frames: int = 0
    deliveries: int = 0
    bytes: int = 0

    def add(self, written: Frames, sockets: int) -> None:
        self.frames += len(written.texts)
        self.deliveries += len(written.texts) * sockets
        self.bytes += written.size * sockets

    def report(self) -> None:
        metrics.HUB_FRAMES.inc(self.frames)
        metrics.HUB_DELIVERIES.inc(self.deliveries)
        metrics.HUB_BYTES.inc(self.bytes)
        self.frames = self.deliveries = self.bytes = 0


class Built:
    """The frames of one batch of events, which are built when the first group needs them."""

    def __init__(self) -> None:
        self._frames: Shared[Frames] = Shared()
        self._texts: Shared[Sequence[bytes]] = Shared()

    def frames_of(self, rendering: Rendering, events: Sequence[Event]) -> Frames:
        """Return the frames of whole events."""
        # Groups with different audiences mostly receive the same events.
        key = (rendering, tuple(event.seq for event in events))
        if key in self._frames:
            return self._frames[key]
        return self._add(key, [frames.event_text(event, rendering) for event in events])

    def frames_of_parts(self, rendering: Rendering, parts: Sequence[Part]) -> Frames:
        """Return the frames of those changes of events that pass a filter."""
        # Most filters that an event affects let the whole event pass, so different filters share the frames.
        places = [(each.event.seq, None if _is_whole(each) else each.wanted) for each in parts]
        key = (rendering, tuple(places))
        if key in self._frames:
            return self._frames[key]
        found = [
            text for part, place in zip(parts, places, strict=True) for text in self._texts_of(rendering, part, place)
        ]
        return self._add(key, [frames.named(text, rendering.subscription) for text in found])

    def _texts_of(self, rendering: Rendering, part: Part, place: Hashable) -> Sequence[bytes]:
        key = (rendering.bulk, place)
        if key in self._texts:
            return self._texts[key]
        texts = change_texts(part.event, rendering.bulk, part.changes, part.total)
        return self._texts.add(key, texts, sum(map(len, texts)))

    def _add(self, key: Hashable, texts: Sequence[bytes]) -> Frames:
        built = Frames(texts)
        return self._frames.add(key, built, built.size)


def _is_whole(part: Part) -> bool:
    return is_whole(part.event, part.changes, part.total)


def texts(spec: Spec, events: Sequence[Event]) -> list[bytes]:
    """Return the frames of consecutive events, unfiltered and with the subscription's name."""
    return [frames.event_text(event, spec.rendering) for event in events if spec.admits(event)]


@dataclass(slots=True)
class _Net:
    """The net effect of a run of events on one row."""

    first: Row | None  # The row before the run, or None if it did not match then.
    last: Row | None  # The row after the run, or None if it does not match then.
    left: bool  # Whether the row still exists, but no longer matches.
    event: Event  # The newest event about the row.
    changed: dict[str, None] = field(default_factory=dict)

    @property
    def encoded(self) -> bytes:
        """The row, or the id of a deleted row."""
        if self.last is not None:
            return data.encode(self.last)
        assert self.first is not None
        return data.encode(self.first["id"])


def coalesce(spec: Spec, events: Iterable[Event], filtered: Callable[[Event], Sequence[FilteredChange]]) -> list[bytes]:
    """Merge events into frames with at most one `add`, `update` or `delete` for each row.

    Return the frames, without a subscription's name.
    `filtered` returns the changes of an event as the filter for its topic sees them.
    """
    nets: dict[tuple[str, int | str], _Net] = {}
    for event in events:
        if not spec.admits(event):
            continue
        for one in filtered(event):
            key = (event.topic, one.change.id)
            net = nets.get(key)
            if net is None:
                net = nets[key] = _Net(one.change.before if one.operation != "add" else None, None, False, event)
            net.last = one.change.after if one.operation != "delete" else None
            net.left = one.left
            net.event = event
            net.changed.update(dict.fromkeys(event.changed))
    return _frames(spec, nets)


def _frames(spec: Spec, nets: dict[tuple[str, int | str], _Net]) -> list[bytes]:
    groups: dict[tuple[str, str, bool], list[_Net]] = {}
    for (topic, _), net in nets.items():
        if net.first is None and net.last is None:
            continue  # the row was added and deleted within the run
        operation = "delete" if net.last is None else "add" if net.first is None else "update"
        groups.setdefault((topic, operation, net.left and net.last is None), []).append(net)
    if not groups:
        return []
    # `seq` covers even rows that were added and deleted within the run. Otherwise, a client that resumed between the
    # two events of such a row would be sent a `delete` without an `add`.
    seq = max(net.event.seq for net in nets.values())
    parts: list[tuple[str, bool, list[_Net], list[bytes]]] = []
    for (_, operation, left), group in groups.items():
        encoded = [net.encoded for net in group]
        slices = data.frame_slices(encoded, max_bytes=MAX_EVENT_BYTES, max_items=MAX_EVENT_ITEMS)
        parts += [(operation, left, group[part], encoded[part]) for part in slices]
    last = len(parts) - 1
    return [
        _frame(spec, seq, operation, left, group, encoded, more=number < last)
        for number, (operation, left, group, encoded) in enumerate(parts)
    ]


def _frame(
    spec: Spec, seq: int, operation: str, left: bool, group: Sequence[_Net], encoded: Sequence[bytes], *, more: bool
) -> bytes:
    if len(group) == 1:
        content = encoded[0] if operation != "delete" else data.deleted(encoded[0])
    else:
        if spec.rendering.bulk == "summary":
            shown = (net.last if net.last is not None else net.first for net in group)
            content = data.summary([row["id"] for row in shown if row is not None], None)
        else:
            content = data.bulk_encoded(operation, encoded)
        operation = f"{operation}_bulk"
    event = max((net.event for net in group), key=lambda event: event.seq)
    changed = list(dict.fromkeys(name for net in group for name in net.changed))
    return frames.part_text(
        event, operation, content, seq=seq, changed=changed, reason=BY_FILTER if left else None, more=more
    )
