"""text in normal form C, and names with a visible character

The rows change for clients, too, so each change has an event in the log: `update_bulk` for rows of resources, `update`
for accounts. `version` and `updated_at` stay the same, because no user has edited the rows. Unique keys stay the same
as well: they are made from a form (NFKC) that is equal for both spellings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any

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
EVENT_SIZE = 512 * 1024  # bytes of an event's rows, before and after

Mend = Callable[[Any, Mapping[str, Any]], Any]  # from a value and its row


def _text(length: int) -> Mend:
    # NFC turns a few characters into two or three; a string that no longer fits is truncated.
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
    for name, mends in COLUMNS.items():
        table = sa.Table(name, sa.MetaData(), autoload_with=op.get_bind())
        for changes in _chunks(_changes(table, mends)):
            if name == "users":
                _log_accounts(changes)
            else:
                _log_rows(name, HIDDEN.get(name, set()), changes)


Change = tuple[dict[str, Any], dict[str, Any]]  # a row before and after


def _changes(table: sa.Table, mends: Mapping[str, Mend]) -> Iterator[Change]:
    """Normalise the rows of a table in the order of their ids, and yield those that have changed."""
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
            # Names that SQL reserves are a subclass of str, which the JSON encoder rejects as keys.
            old = {str(name): value for name, value in before.items()}
            yield old, {**old, **values}


def _mended(row: Any, mends: Mapping[str, Mend]) -> dict[str, Any]:
    made = {name: mend(row[name], row) for name, mend in mends.items() if row[name] is not None}
    return {name: value for name, value in made.items() if value != row[name]}


def _chunks(changes: Iterator[Change]) -> Iterator[list[Change]]:
    """Yield the changes in lists, each of which fits into one event."""
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


def _log_rows(name: str, hidden: set[str], changes: Sequence[Change]) -> None:
    before, after = ([_shown(change[side], hidden) for change in changes] for side in (0, 1))
    changed = {column for old, new in zip(before, after, strict=True) for column in new if new[column] != old[column]}
    payload = {"count": len(after), "items": after}
    _append([(name, "update_bulk", None, "public", payload, before, sorted(changed))])


def _log_accounts(changes: Sequence[Change]) -> None:
    events = []
    for change in changes:
        before, after = (_account(row) for row in change)
        changed = [column for column in after if after[column] != before[column]]
        for topic, audience in (("users", "group:admin"), ("account", f"user:{after['id']}")):
            events.append((topic, "update", str(after["id"]), audience, after, before, changed))
    _append(events)


def _account(row: Mapping[str, Any]) -> dict[str, Any]:
    avatar = row["avatar"]
    return _shown(row, HIDDEN["users"]) | {
        "avatar_url": f"/avatars/{avatar}/512" if avatar else None,
        "avatar_thumbnail_url": f"/avatars/{avatar}/128" if avatar else None,
        "has_profile": row["profile_created_at"] is not None,
    }


def _append(events: Sequence[tuple[str, str, str | None, str, Any, Any, list[str]]]) -> None:
    """Number and insert events, as `repository.engine.append` does for other writes."""
    bind = op.get_bind()
    take = sa.text("UPDATE event_head SET seq = seq + :count, size = size + :size WHERE id = 1 RETURNING seq")
    payloads = [(orjson.dumps(each[4]), orjson.dumps(each[5])) for each in events]
    size = sum(len(payload) + len(before) for payload, before in payloads)
    last: int = bind.execute(take, {"count": len(events), "size": size}).scalar_one()
    now = datetime.now(UTC)
    table = sa.table(
        "events",
        *(sa.column(name) for name in ("seq", "topic", "operation", "entity_id", "audience", "payload", "before")),
        *(sa.column(name) for name in ("changed", "created_at")),
    )
    rows = [
        {
            "seq": seq,
            "topic": topic,
            "operation": operation,
            "entity_id": entity_id,
            "audience": audience,
            "payload": payload,
            "before": before,
            "changed": orjson.dumps(changed).decode(),
            "created_at": utc_text(now) if bind.dialect.name == "sqlite" else now,
        }
        for seq, (topic, operation, entity_id, audience, _, _, changed), (payload, before) in zip(
            range(last - len(events) + 1, last + 1), events, payloads, strict=True
        )
    ]
    bind.execute(table.insert(), rows)


def downgrade() -> None:
    """Leave the text as it is: earlier versions can read it."""
