"""The frames of a subscription that catches up or sends intervals: events in, encoded frames out. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import orjson

from core.filters import Row
from realtime.fanout.changes import BY_FILTER, Change, changes_of, compiled, filtered_texts, see
from realtime.fanout.spec import Spec
from realtime.wire import frames
from repository.engine.events import Event
from repository.engine.transaction import MAX_EVENT_BYTES, MAX_EVENT_ITEMS


def texts(spec: Spec, events: Sequence[Event]) -> list[bytes]:
    """Return the frames of consecutive events, as a subscription that is not live writes them."""
    if spec.latest_every_ms is not None:
        return [frames.named(text, spec.rendering.subscription) for text in coalesce(spec, events)]
    admitted = [event for event in events if spec.admits(event)]
    if not spec.filters:
        return [frames.event_text(event, spec.rendering) for event in admitted]
    filters = dict(spec.filters)
    return [text for event in admitted for text in filtered_texts(event, spec.rendering, filters[event.topic])]


@dataclass(slots=True)
class _Net:
    """What a window did to one entity."""

    first: Row | None  # what it was when the window began, None when it was not in view
    last: Row | None
    left: bool
    event: Event
    changed: dict[str, None] = field(default_factory=dict)


def coalesce(spec: Spec, events: Iterable[Event], decode: Callable[[Event], list[Change]] = changes_of) -> list[bytes]:
    """The frames of a window, without a name: one `add`, `update` or `delete` at most for each entity."""
    nets: dict[tuple[str, int | str], _Net] = {}
    filters = dict(spec.filters)
    for event in events:
        if not spec.admits(event):
            continue
        wanted = filters.get(event.topic)
        changes = decode(event)
        # Without a filter everything matches, before and after.
        seen = see(compiled(wanted), changes) if wanted is not None else see(lambda _: True, changes)
        for one in seen:
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
            continue  # came and went between two beats
        operation = "delete" if net.last is None else "add" if net.first is None else "update"
        groups.setdefault((topic, operation, net.left and net.last is None), []).append(net)
    if not groups:
        return []
    # Of what came and went, too: a client that resumed between its two events would be told of its end alone.
    seq = max(net.event.seq for net in nets.values())
    parts = [
        (operation, left, part)
        for (_, operation, left), group in groups.items()
        for part in _parts([(net, _encoded(net)) for net in group])
    ]
    last = len(parts) - 1
    return [
        _frame(spec, seq, operation, left, part, more=number < last)
        for number, (operation, left, part) in enumerate(parts)
    ]


def _encoded(net: _Net) -> bytes:
    """The row, or the id of one that is gone."""
    if net.last is not None:
        return orjson.dumps(net.last)
    assert net.first is not None
    return orjson.dumps(net.first["id"])


def _parts(group: Sequence[tuple[_Net, bytes]]) -> Iterator[Sequence[tuple[_Net, bytes]]]:
    """Within the bounds of one frame."""
    start, size = 0, 0
    for index, (_, encoded) in enumerate(group):
        if index > start and (size + len(encoded) > MAX_EVENT_BYTES or index - start >= MAX_EVENT_ITEMS):
            yield group[start:index]
            start, size = index, 0
        size += len(encoded) + 1
    yield group[start:]


def _frame(
    spec: Spec, seq: int, operation: str, left: bool, part: Sequence[tuple[_Net, bytes]], *, more: bool
) -> bytes:
    changed = list(dict.fromkeys(name for net, _ in part for name in net.changed))
    event = max((net.event for net, _ in part), key=lambda event: event.seq)
    items = [encoded for _, encoded in part]
    if len(part) == 1:
        data = items[0] if operation != "delete" else b'{"id":%s}' % items[0]
    else:
        if spec.rendering.bulk == "summary":
            rows = (net.last if net.last is not None else net.first for net, _ in part)
            data = frames.summary([row["id"] for row in rows if row is not None], None)
        else:
            key = b"ids" if operation == "delete" else b"items"
            data = b'{"count":%d,"%s":[%s]}' % (len(items), key, b",".join(items))
        operation = f"{operation}_bulk"
    reason = BY_FILTER if left else None
    return frames.part_text(event, operation, data, seq=seq, changed=changed, reason=reason, more=more)
