"""The evaluation, in slices, of the filters of subscriptions that are behind the head.

Rules:
- One subscription is evaluated at a time, in order of request, and after SLICE_SECONDS of work the event loop runs
  everything else. Filters, however many and large, therefore delay only their own subscriptions.
- In one turn of the event loop, only MAX_PAGES_PER_TURN subscriptions begin to read a page, however many fall behind.
- When equal subscriptions are behind together, for example after a group has left the hub, each event is decoded and
  filtered only once for all of them, because the rows and the resulting frames are kept for a while.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from core.filters import Filter, Row
from realtime.fanout import encode
from realtime.fanout.changes import (
    Change,
    FilteredChange,
    change_texts,
    changes_of,
    filter_changes,
    is_whole,
    matcher_for,
)
from realtime.fanout.slices import PerTurn
from realtime.fanout.spec import Spec
from realtime.wire import frames
from realtime.wire.frames import Rendering
from repository.engine.events import Event

SLICE_SECONDS = 0.002  # Evaluation may take up to SLICE_SECONDS of each turn of the event loop.
SLICE_TESTS = 1_000  # The clock is read after about SLICE_TESTS condition tests.
MAX_PAGES_PER_TURN = 16  # Reading, building and writing a page of `feed.PAGE_BYTES` takes up to 0.5 ms.
MAX_DECODED_BYTES = 1024 * 1024  # Decoded, events take up to ten times as much. A page has half of it.
MAX_KEPT_TEXT_BYTES = 4 * 1024 * 1024
MAX_KEPT_TEXTS = 256

_Key = tuple[str, int, Filter, str]  # the event's epoch and number, the filter, and how bulk events are rendered


class Evaluation:
    """Evaluates the filters of all subscriptions that are behind. One per process."""

    def __init__(self) -> None:
        self.pages = PerTurn(MAX_PAGES_PER_TURN)
        self._turn = asyncio.Lock()
        self._resumed_at = 0.0
        self._worked_seconds = 0.0  # the time spent on evaluation in the current turn of the event loop
        self._decoded: dict[tuple[str, int], list[Change]] = {}  # by the epochs and numbers of the events
        self._decoded_bytes = 0
        self._kept: OrderedDict[_Key, Sequence[bytes]] = OrderedDict()
        self._kept_bytes = 0

    async def texts(self, spec: Spec, events: Sequence[Event]) -> list[bytes]:
        """Return the frames of consecutive events, with the subscription's name."""
        if not spec.filters and spec.latest_every_ms is None:
            return encode.texts(spec, events)
        filters = dict(spec.filters)
        admitted = [event for event in events if spec.admits(event)]
        async with self._turn:
            self._resumed_at = time.perf_counter()
            if spec.latest_every_ms is not None:
                filtered = {event.seq: await self._filtered(event, filters.get(event.topic)) for event in admitted}
                found = encode.coalesce(spec, admitted, lambda event: filtered[event.seq])
            else:
                found = []
                rendering = Rendering(spec.rendering.bulk)
                for event in admitted:
                    found += await self._texts_of(event, filters[event.topic], rendering)
            await self._pause()
        return [frames.named(text, spec.rendering.subscription) for text in found]

    async def former_rows(self, event: Event, wanted: Filter | None) -> Mapping[int | str, Row | None]:
        """Return the rows of an event as they were before the event, by id; None if a row did not exist or match."""
        matches = matcher_for(wanted)
        found: dict[int | str, Row | None] = {}
        async with self._turn:
            self._resumed_at = time.perf_counter()
            for change in self._changes_of(event):
                did_match = change.before is not None and matches(change.before, change.folded[0])
                found[change.id] = change.before if did_match else None
                await self._pause()
        return found

    async def _texts_of(self, event: Event, wanted: Filter, rendering: Rendering) -> Sequence[bytes]:
        is_sent_whole = event.built.get(wanted)
        if is_sent_whole is not None:
            return (frames.event_text(event, rendering),) if is_sent_whole else ()
        key = (event.epoch, event.seq, wanted, rendering.bulk)
        texts = self._kept.get(key)
        if texts is None:
            filtered = await self._filtered(event, wanted)
            total = len(self._changes_of(event))
            texts = change_texts(event, rendering.bulk, filtered, total)
            if not filtered or is_whole(event, filtered, total):
                # An event that is sent whole or not at all stores only which of the two it is, not the texts.
                frames.keep(event, wanted, bool(filtered))
            else:
                self._keep(key, texts)
            await self._pause()
        return texts

    async def _filtered(self, event: Event, wanted: Filter | None) -> list[FilteredChange]:
        changes, matches = self._changes_of(event), matcher_for(wanted)
        await self._pause()
        rows = max(1, SLICE_TESTS // max(1, wanted.size if wanted is not None else 1))
        if wanted is not None and wanted.splits:
            rows = 1  # splitting the long texts of one row into words may take a millisecond
        found: list[FilteredChange] = []
        for start in range(0, len(changes), rows):
            found += filter_changes(matches, changes[start : start + rows])
            await self._pause()
        return found

    def _changes_of(self, event: Event) -> list[Change]:
        key = (event.epoch, event.seq)
        changes = self._decoded.get(key)
        if changes is None:
            changes = changes_of(event)
            if self._decoded_bytes + event.size > MAX_DECODED_BYTES:
                self._decoded.clear()
                self._decoded_bytes = 0
            self._decoded[key] = changes
            self._decoded_bytes += event.size
        return changes

    def _keep(self, key: _Key, texts: Sequence[bytes]) -> None:
        self._kept[key] = texts
        self._kept_bytes += sum(map(len, texts))
        while self._kept_bytes > MAX_KEPT_TEXT_BYTES or len(self._kept) > MAX_KEPT_TEXTS:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= sum(map(len, oldest))

    async def _pause(self) -> None:
        """Yield to the event loop if the work in its current turn has taken SLICE_SECONDS."""
        now = time.perf_counter()
        self._worked_seconds += now - self._resumed_at
        self._resumed_at = now
        if self._worked_seconds >= SLICE_SECONDS:
            self._worked_seconds = 0.0
            await asyncio.sleep(0)
            self._resumed_at = time.perf_counter()
