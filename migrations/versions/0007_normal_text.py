"""text in Unicode normal form C, and names with at least one visible character

Clients see the changes, so each change has an event in the log: `update_bulk` for rows of resources, `update` for
accounts. `version` and `updated_at` stay the same, because no user has edited the rows. Unique keys stay the same, too,
because they are derived with NFKC, which maps the old and the new spelling to the same form. The only exception is a
genre whose name had no visible character: the name is replaced, so the genre gets a new key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any, NamedTuple

import orjson
import sqlalchemy as sa
from alembic import op

from core.identity import unique_key
from core.texts.normal import is_visible, nfc
from core.times import utc_text

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

ROWS_AT_A_TIME = 2_000
ROWS_OF_AN_EVENT = 1_000
EVENT_SIZE = 512 * 1024  # limit in bytes for the rows of one event, before and after the change together

Mend = Callable[[Any, Mapping[str, Any]], Any]  # a function that takes a value and its row and returns the new value


def _text(length: int) -> Mend:
    # NFC expands a few characters into two or three, so a string that no longer fits its column is truncated.
    return lambda value, row: nfc(value)[:length]


def _visible(length: int) -> Mend:
    return lambda value, row: nfc(value)[:length] if is_visible(value) else None


def _name(word: str, length: int) -> Mend:
    return lambda value, row: nfc(value)[:length] if is_visible(value) else f"{word} {row['id']}"


def _words(values: list[str], row: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(nfc(value)[:50] for value in values if is_visible(value)))


COLUMNS: Mapping[str, Mapping[str, Mend]] = {
    "movies": {
        "title": _name("Untitled", 255),
        "description": _text(10_000),
        "status": _visible(50),
        "languages": _words,
        "genres": _words,
    },
    "characters": {"name": _name("Unnamed", 255), "description": _text(10_000)},
    "genres": {"name": _name("Unnamed", 100), "description": _text(10_000)},
    "users": {
        "username": _text(50),
        "name": _visible(100),
        "first_name": _visible(100),
        "last_name": _visible(100),
        "info": _text(10_000),
    },
}
# Columns that clients do not see.
HIDDEN = {
    "genres": {"name_key"},
    "users": {"password_hash", "username_key", "email_key", "avatar", "profile_created_at", "deleted_at"},
}


def upgrade() -> None:
    events: list[Event] = []
    for name, mends in COLUMNS.items():
        table = sa.Table(name, sa.MetaData(), autoload_with=op.get_bind())
        for changes in _chunks(_changes(table, mends)):
            events += _of_accounts(changes) if name == "users" else _of_rows(name, HIDDEN.get(name, set()), changes)
    if events:
        # The events are appended last, because other writers lock rows before they lock the head of the log.
        _append(events)


Change = tuple[dict[str, Any], dict[str, Any]]  # a row before and after its change


class Event(NamedTuple):
    """An event that has no number yet. Its fields are columns of the table `events`."""

    topic: str
    operation: str
    entity_id: str | None
    audience: str
    payload: bytes
    before: bytes
    changed: list[str]


def _changes(table: sa.Table, mends: Mapping[str, Mend]) -> Iterator[Change]:
    """Normalise the rows of a table in order of id. Yield each changed row, as it was before and as it is now."""
    bind, last = op.get_bind(), 0
    read = sa.select(table.c.id, *(table.c[name] for name in mends)).order_by(table.c.id).limit(ROWS_AT_A_TIME)
    while found := bind.execute(read.where(table.c.id > last)).mappings().all():
        last = found[-1]["id"]
        ids = [row["id"] for row in found if _mended(row, mends)]
        if not ids:
            continue
        locked = sa.select(table).where(table.c.id.in_(ids)).order_by(table.c.id).with_for_update()
        for before in bind.execute(locked).mappings().all():
            values = _mended(before, mends)
            if not values:
                continue
            if table.name == "genres" and not is_visible(before["name"]):
                values["name_key"] = unique_key(values["name"])
            bind.execute(sa.update(table).where(table.c.id == before["id"]).values(values))
            # SQLAlchemy names some columns with a subclass of str, which the JSON encoder rejects as a key.
            old = {str(name): value for name, value in before.items()}
            yield old, {**old, **values}


def _mended(row: Any, mends: Mapping[str, Mend]) -> dict[str, Any]:
    made = {name: mend(row[name], row) for name, mend in mends.items() if row[name] is not None}
    return {name: value for name, value in made.items() if value != row[name]}


def _chunks(changes: Iterator[Change]) -> Iterator[list[Change]]:
    """Group the changes into lists that each fit into one event, and yield the lists."""
    chunk: list[Change] = []
    size = 0
    for change in changes:
        length = sum(len(orjson.dumps(row, default=str)) for row in change)
        if chunk and (len(chunk) == ROWS_OF_AN_EVENT or size + length > EVENT_SIZE):
            yield chunk
            chunk, size = [], 0
        chunk.append(change)
        size += length
    if chunk:
        yield chunk


# --- events


def _shown(row: Mapping[str, Any], hidden: set[str]) -> dict[str, Any]:
    return {name: _as_json(value) for name, value in row.items() if name not in hidden}


def _as_json(value: Any) -> Any:
    if isinstance(value, datetime):
        return utc_text(value)
    return value.isoformat() if isinstance(value, date) else value


def _of_rows(name: str, hidden: set[str], changes: Sequence[Change]) -> list[Event]:
    before, after = ([_shown(change[side], hidden) for change in changes] for side in (0, 1))
    changed = {column for old, new in zip(before, after, strict=True) for column in new if new[column] != old[column]}
    payload = {"count": len(after), "items": after}
    return [Event(name, "update_bulk", None, "public", orjson.dumps(payload), orjson.dumps(before), sorted(changed))]


def _of_accounts(changes: Sequence[Change]) -> list[Event]:
    events = []
    for change in changes:
        before, after = (_account(row) for row in change)
        changed = [column for column in after if after[column] != before[column]]
        payload, former = orjson.dumps(after), orjson.dumps(before)
        for topic, audience in (("users", "group:admin"), ("account", f"user:{after['id']}")):
            events.append(Event(topic, "update", str(after["id"]), audience, payload, former, changed))
    return events


def _account(row: Mapping[str, Any]) -> dict[str, Any]:
    avatar = row["avatar"]
    return _shown(row, HIDDEN["users"]) | {
        "avatar_url": f"/avatars/{avatar}/512" if avatar else None,
        "avatar_thumbnail_url": f"/avatars/{avatar}/128" if avatar else None,
        "has_profile": row["profile_created_at"] is not None,
    }


def _append(events: Sequence[Event]) -> None:
    """Number and insert events, as `repository.engine.append` does for other writes."""
    bind = op.get_bind()
    take = sa.text("UPDATE event_head SET seq = seq + :count, size = size + :size WHERE id = 1 RETURNING seq")
    size = sum(len(event.payload) + len(event.before) for event in events)
    last: int = bind.execute(take, {"count": len(events), "size": size}).scalar_one()
    now = datetime.now(UTC)
    table = sa.table("events", *map(sa.column, ("seq", *Event._fields, "created_at")))
    created_at = utc_text(now) if bind.dialect.name == "sqlite" else now
    rows = [
        {**event._asdict(), "changed": orjson.dumps(event.changed).decode(), "seq": seq, "created_at": created_at}
        for seq, event in enumerate(events, last - len(events) + 1)
    ]
    bind.execute(table.insert(), rows)


def downgrade() -> None:
    """Do nothing, because earlier versions can read the normalised text."""
