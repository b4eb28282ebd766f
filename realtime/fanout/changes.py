"""What an event means for one filter: which rows enter, change, and leave. Pure.

An event holds what the rows are and what they were. A row that matched neither before nor after is nobody's business;
one that starts to match is an `add`, one that stops matching a `delete` for the reason "filter".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson

from core.filters import Filter, Matcher, Row, matcher_of
from realtime.wire import frames
from realtime.wire.frames import Rendering
from repository.engine.events import Event

BY_FILTER = "filter"
MAX_COMPILED_FILTERS = 128  # of those that catch up; a filter may be large


@dataclass(frozen=True, slots=True)
class Change:
    """One row of an event: what it was and what it is, None where it is not."""

    before: Row | None
    after: Row | None

    @property
    def id(self) -> int | str:
        row = self.after if self.after is not None else self.before
        assert row is not None
        found: int | str = row["id"]
        return found

    @property
    def rows(self) -> list[Row]:
        return [row for row in (self.before, self.after) if row is not None]


@dataclass(frozen=True, slots=True)
class Seen:
    """A change as one filter sees it. `left` means that the row still is, but matches no more."""

    operation: str  # add, update or delete
    change: Change
    left: bool = False


compiled = lru_cache(maxsize=MAX_COMPILED_FILTERS)(matcher_of)


def changes_of(event: Event) -> list[Change]:
    payload = orjson.loads(event.payload)
    before = orjson.loads(event.before) if event.before is not None else None
    match event.operation:
        case "add":
            return [Change(None, payload)]
        case "update":
            return [Change(before, payload)]
        case "delete":
            return [Change(before, None)]
        case "add_bulk":
            return [Change(None, row) for row in payload["items"]]
        case "update_bulk":
            assert before is not None, "an update is stored with what was before"
            return [Change(old, new) for old, new in zip(before, payload["items"], strict=True)]
        case "delete_bulk":
            assert before is not None, "a delete is stored with what was before"
            return [Change(old, None) for old in before]
    raise AssertionError(event.operation)


def see(test: Matcher, changes: Iterable[Change]) -> list[Seen]:
    """The changes that a filter has anything to do with."""
    found = []
    for change in changes:
        was = change.before is not None and test(change.before)
        if change.after is not None and test(change.after):
            found.append(Seen("update" if was else "add", change))
        elif was:
            found.append(Seen("delete", change, left=change.after is not None))
    return found


def filtered_texts(event: Event, rendering: Rendering, wanted: Filter) -> Sequence[bytes]:
    """The frames of an event for a filter, none when it is about none of its rows."""
    verdict = event.built.get(wanted)
    if verdict is None:
        changes = changes_of(event)
        seen = see(compiled(wanted), changes)
        # What costs next to nothing is kept with the event: that it is wanted as it is, or not at all.
        verdict = is_whole(event, seen, len(changes)) if seen else False
        if verdict or not seen:
            frames.keep(event, wanted, verdict)
        else:
            return tuple(frames.named(text, rendering.subscription) for text in _parts(event, rendering.bulk, seen))
    return (frames.event_text(event, rendering),) if verdict else ()


def is_whole(event: Event, seen: Sequence[Seen], total: int) -> bool:
    """Whether all of an event with `total` changes is seen as what it is."""
    own = event.operation.removesuffix("_bulk")
    return len(seen) == total and all(one.operation == own and not one.left for one in seen)


def seen_texts(event: Event, bulk: str, seen: Sequence[Seen], total: int) -> Sequence[bytes]:
    """The frames of what was seen of an event with `total` changes, without a name."""
    if not seen:
        return ()
    if is_whole(event, seen, total):
        return (frames.event_text(event, Rendering("summary" if bulk == "summary" else "items")),)
    return _parts(event, bulk, seen)


def _parts(event: Event, bulk: str, seen: Sequence[Seen]) -> Sequence[bytes]:
    own = event.operation.removesuffix("_bulk")
    if own == event.operation:
        (one,) = seen
        data = event.payload if one.operation == "add" else orjson.dumps({"id": one.change.id})
        return (frames.part_text(event, one.operation, data, reason=BY_FILTER if one.left else None),)
    job_id = frames.job_of(event)
    parts: list[tuple[str, bytes, str | None]] = []
    for operation in ("add", "update", "delete"):
        group = [one.change for one in seen if one.operation == operation]
        if group:
            left = operation == "delete" and own != "delete"
            parts.append((f"{operation}_bulk", bulk_data(operation, group, bulk, job_id), BY_FILTER if left else None))
    last = len(parts) - 1
    return tuple(
        frames.part_text(event, operation, data, reason=reason, more=number < last)
        for number, (operation, data, reason) in enumerate(parts)
    )


def bulk_data(operation: str, group: Sequence[Change], bulk: str, job_id: str | None) -> bytes:
    """The `data` of a bulk frame about these changes."""
    ids = [change.id for change in group]
    if bulk == "summary":
        return frames.summary(ids, job_id)
    data: dict[str, Any] = {"count": len(ids)}
    if operation == "delete":
        data["ids"] = ids
    else:
        data["items"] = [change.after for change in group]
    if job_id is not None:
        data["job_id"] = job_id
    return orjson.dumps(data)
