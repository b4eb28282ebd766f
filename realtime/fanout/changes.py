"""What an event means for one filter: which rows begin to match, change, or stop matching. Pure.

Rules:
- An event holds its rows as they are after the write and as they were before it.
- A row that matches neither before nor after the event is left out. A row that starts to match is an `add`; a row that
  stops matching is a `delete` with the reason "filter".
- An event is sent unchanged if its rows match in every state that the event holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import orjson

from core.filters import Filter, Folded, Matcher, Row, matcher_of
from realtime.wire import data, frames
from realtime.wire.frames import Rendering
from repository.engine.events import Event

BY_FILTER = "filter"
MAX_COMPILED_FILTERS = 128  # only a few compiled filters are cached, because a filter may be large


@dataclass(slots=True)
class Change:
    """One row of an event. `before` is None for a new row, and `after` is None for a deleted row.

    `folded` caches the lowercase strings of `before` and of `after` for all filters that are evaluated on the change.
    """

    before: Row | None
    after: Row | None
    folded: tuple[Folded, Folded] = field(default_factory=lambda: ({}, {}), compare=False, repr=False)

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
class FilteredChange:
    """A change as one filter sees it. `left` means that the row still exists, but no longer matches."""

    operation: str  # add, update or delete
    change: Change
    left: bool = False


compiled = lru_cache(maxsize=MAX_COMPILED_FILTERS)(matcher_of)


def _everything(row: Row, folded: Folded | None = None) -> bool:
    return True


def matcher_for(wanted: Filter | None) -> Matcher:
    """Return the matcher of a filter. Without a filter, every row matches."""
    return compiled(wanted) if wanted is not None else _everything


def changes_of(event: Event) -> list[Change]:
    """Decode the rows of an event."""
    payload = orjson.loads(event.payload)
    before = orjson.loads(event.before) if event.before is not None else None
    match event.operation:
        case "add":
            return [Change(None, payload)]
        case "update":
            return [Change(_former(payload, before) if before is not None else None, payload)]
        case "delete":
            return [Change(before, None)]
        case "add_bulk":
            return [Change(None, row) for row in payload["items"]]
        case "update_bulk":
            assert before is not None, "expected an update event to hold the former rows"
            return [Change(_former(new, old), new) for old, new in zip(before, payload["items"], strict=True)]
        case "delete_bulk":
            assert before is not None, "expected a delete event to hold the deleted rows"
            return [Change(old, None) for old in before]
    raise AssertionError(event.operation)


def _former(row: Row, former_values: Row) -> Row:
    """Return the whole row as it was before an update. The event holds only the former values of changed fields."""
    return {**row, **former_values}


def filter_changes(matches: Matcher, changes: Iterable[Change]) -> list[FilteredChange]:
    """Return the changes whose row matches before or after the event."""
    found = []
    for change in changes:
        before, after = change.folded
        was = change.before is not None and matches(change.before, before)
        if change.after is not None and matches(change.after, after):
            found.append(FilteredChange("update" if was else "add", change))
        elif was:
            found.append(FilteredChange("delete", change, left=change.after is not None))
    return found


def is_whole(event: Event, filtered: Sequence[FilteredChange], total: int) -> bool:
    """Return whether all `total` changes of the event pass the filter, each with the event's own operation."""
    own = event.operation.removesuffix("_bulk")
    return len(filtered) == total and all(one.operation == own and not one.left for one in filtered)


def change_texts(event: Event, bulk: str, filtered: Sequence[FilteredChange], total: int) -> Sequence[bytes]:
    """Return the frames, without a subscription's name, of those changes of an event that pass a filter.

    `total` is the number of all changes of the event.
    """
    if not filtered:
        return ()
    if is_whole(event, filtered, total):
        return (frames.event_text(event, Rendering("summary" if bulk == "summary" else "items")),)
    return _parts(event, bulk, filtered)


def _parts(event: Event, bulk: str, filtered: Sequence[FilteredChange]) -> Sequence[bytes]:
    own = event.operation.removesuffix("_bulk")
    if own == event.operation:
        (one,) = filtered
        content = event.payload if one.operation == "add" else data.deleted(data.encode(one.change.id))
        return (frames.part_text(event, one.operation, content, reason=BY_FILTER if one.left else None),)
    job_id = frames.job_of(event)
    parts: list[tuple[str, bytes, str | None]] = []
    for operation in ("add", "update", "delete"):
        group = [one.change for one in filtered if one.operation == operation]
        if group:
            left = operation == "delete" and own != "delete"
            content = bulk_data(operation, group, bulk, job_id)
            parts.append((f"{operation}_bulk", content, BY_FILTER if left else None))
    last = len(parts) - 1
    return tuple(
        frames.part_text(event, operation, content, reason=reason, more=number < last)
        for number, (operation, content, reason) in enumerate(parts)
    )


def bulk_data(operation: str, group: Sequence[Change], bulk: str, job_id: str | None) -> bytes:
    """Return the `data` of a bulk frame about these changes."""
    ids = [change.id for change in group]
    if bulk == "summary":
        return data.summary(ids, job_id)
    return data.bulk(operation, ids if operation == "delete" else [change.after for change in group], job_id)
