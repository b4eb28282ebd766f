"""The newest state of each entity, at most so often, for dashboards (`deliver: {"latest_every_ms": n}`).

Such a subscription is never given events one by one. At each beat of its pulse it gets what changed, in sum, since the
beat before: read from the ring, so nothing is kept per subscription but its place. Every state that it shows is one
that an event carried, hence one that was committed. A socket that is still full at a beat goes on at its own pace, as
any that is behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import orjson
import structlog

import metrics
from filters import Row
from realtime import frames
from realtime.changes import BY_FILTER, Change, changes_of, compiled, see
from realtime.frames import Frames, Rendering
from realtime.stream import HIGH_WATER_BYTES
from repository.event_log import Event
from repository.transaction import MAX_EVENT_BYTES, MAX_EVENT_ITEMS

if TYPE_CHECKING:
    from realtime.subscription import Spec, Subscription

PAGES_PER_BEAT = 2  # more than this behind, a subscription catches up at its own pace

log = structlog.get_logger("latest")


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


class Pulse:
    """All subscriptions that want the newest state every so many milliseconds."""

    def __init__(self, interval_ms: int, read: Callable[[int], list[Event] | None]) -> None:
        self.members: set[Subscription] = set()
        self._interval = interval_ms / 1000
        self._read = read
        self._timer: asyncio.TimerHandle | None = None

    def join(self, subscription: Subscription) -> None:
        self.members.add(subscription)
        self._wind()

    def leave(self, subscription: Subscription) -> None:
        self.members.discard(subscription)
        if not self.members and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wind(self) -> None:
        if self._timer is None and self.members:
            self._timer = asyncio.get_running_loop().call_later(self._interval, self._beat)

    def _beat(self) -> None:
        self._timer = None
        try:
            self._tell(list(self.members))
        finally:
            self._wind()

    def _tell(self, members: Sequence[Subscription]) -> None:
        decoded: dict[int, list[Change]] = {}

        def decode(event: Event) -> list[Change]:
            """Once for all who want different things of it."""
            if event.seq not in decoded:
                decoded[event.seq] = changes_of(event)
            return decoded[event.seq]

        windows: dict[tuple[Spec, int], tuple[list[bytes], int] | None] = {}
        built: dict[tuple[Spec, int, str | None], Frames] = {}
        for subscription in members:
            # The name makes no difference to what has changed.
            spec = replace(subscription.spec, rendering=Rendering(subscription.spec.rendering.bulk))
            start = subscription.position
            try:
                if (spec, start) not in windows:
                    windows[spec, start] = self._window(spec, start, decode)
                window = windows[spec, start]
                if window is None or subscription.stream.buffered() > HIGH_WATER_BYTES:
                    # Too much at once, or a socket that is still full: it goes on at its own pace.
                    self._let_go(subscription)
                    continue
                texts, subscription.position = window
                if not texts:
                    continue
                name = subscription.spec.rendering.subscription
                if (spec, start, name) not in built:
                    built[spec, start, name] = Frames([frames.named(text, name) for text in texts])
                found = built[spec, start, name]
                subscription.stream.write(found)
                metrics.HUB_DELIVERIES.inc(len(found.texts))
                metrics.HUB_BYTES.inc(found.size)
            except Exception as error:
                # The others go on; this one meets it again in its own task, which closes what it cannot serve.
                log.error("telling of a window failed", exc_info=error)
                subscription.position = start
                self._let_go(subscription)

    def _let_go(self, subscription: Subscription) -> None:
        self.members.discard(subscription)
        subscription.fall_behind(subscription.position)

    def _window(
        self, spec: Spec, start: int, decode: Callable[[Event], list[Change]]
    ) -> tuple[list[bytes], int] | None:
        """The frames since `start` and the new place, or None when there is too much for one beat."""
        events: list[Event] = []
        position = start
        for _ in range(PAGES_PER_BEAT):
            page = self._read(position)
            if page is None:
                return None
            if not page:
                break
            events += page
            position = page[-1].seq
        else:
            if self._read(position) != []:
                return None
        return coalesce(spec, events, decode), position
