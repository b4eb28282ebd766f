"""The audit trail: what admins do to accounts and what staff do to rows that are not their own.

Each entry is stored in the transaction of its action and sent to admins as an event. Entries are kept forever, even
after the account or the rows are deleted. So they hold no personal data: for a name, an address or a date of birth, an
entry says that the value changed, not what it was or is. The same goes for the fields of rows, whose values may be
long.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import insert

import models
from core.identity import Group, Identity
from core.times import utc_now
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic import filter_sql, rows
from repository.generic.cursors import Ordering, total_order
from repository.generic.lists import Listed, ListRequest, entities_of
from repository.generic.rows import entity
from repository.generic.versions import BOOKKEEPING, Row, changed_names

AUDIENCE = f"group:{Group.ADMIN}"
# An entry names at most this many rows but counts all, so that a list of a thousand entries is not too large.
MAX_NAMED_ROWS = 100
ORDERING = Ordering(models.audit, lambda sort, after: total_order(sort or (("id", after is None),)))
_NOT_PERSONAL = frozenset({"group", "is_active", "awaits_activation", "has_profile"})


@dataclass(frozen=True, slots=True)
class Editor:
    """The user who edits, and their IP address. `is_admin`: they edit as an admin, not as the account's owner."""

    user_id: int
    address: str | None
    is_admin: bool


def public(row: Row) -> dict[str, Any]:
    """Return the entry as admins see it: every column."""
    return dict(row)


async def record(tx: Transaction, action: str, user_id: int, editor: Editor | None, changes: Row) -> None:
    """Store an entry and emit its event.

    `changes` maps each changed field to its old and new value, such as `{"group": ["user", "admin"]}`, or to an empty
    list for personal data. `editor` is None for an action on the command line or at the start of the service.
    """
    actor_id, address = (editor.user_id, editor.address) if editor is not None else (None, None)
    values = _values(actor_id, action, "users", user_id, [user_id], changes, address)
    stored = await tx.connection.execute(insert(models.audit).values(values).returning(models.audit))
    tx.emit("audit", "add", public(entity(stored.one())), actor_id=actor_id, audience=AUDIENCE)


async def record_for_rows(
    tx: Transaction,
    action: str,
    resource: str,
    identity: Identity,
    foreign: Iterable[Row],
    changed: Sequence[str] = (),
) -> None:
    """Store an entry, with its event, for each owner of the `foreign` rows, which only staff may write."""
    ids: dict[int | None, list[int | str]] = {}
    for row in foreign:
        ids.setdefault(row.get("user_id"), []).append(row["id"])
    if not ids:
        return
    changes: Row = {name: [] for name in changed}
    made = [
        _values(identity.user_id, action, resource, owner_id, of_owner, changes, tx.address)
        for owner_id, of_owner in ids.items()
    ]
    entry_ids = await rows.reserve_ids(tx, models.audit, len(made))
    entries = [{"id": entry_id, **each} for entry_id, each in zip(entry_ids, made, strict=True)]
    await tx.connection.execute(insert(models.audit), entries)
    for entry in entries:
        tx.emit("audit", "add", public(entry), actor_id=identity.user_id, audience=AUDIENCE)


def _values(
    actor_id: int | None,
    action: str,
    resource: str,
    user_id: int | None,
    ids: Sequence[int | str],
    changes: Row,
    address: str | None,
) -> dict[str, Any]:
    """Return the columns of an entry except its id, in the order of the table."""
    return {
        "actor_id": actor_id,
        "action": action,
        "user_id": user_id,
        "changes": dict(changes),
        "address": address,
        "created_at": utc_now(),
        "resource": resource,
        "entity_ids": list(ids[:MAX_NAMED_ROWS]),
        "count": len(ids),
    }


async def record_changes(tx: Transaction, action: str, before: Row, after: Row, editor: Editor) -> None:
    """Record the difference between two public forms of an account; do nothing when they are equal."""
    changed = [name for name in changed_names(before, after) if name not in BOOKKEEPING]
    if changed:
        changes = {name: [before[name], after[name]] if name in _NOT_PERSONAL else [] for name in changed}
        await record(tx, action, after["id"], editor, changes)


async def page_of(database: Database, page: ListRequest) -> Listed[dict[str, Any]]:
    """Return a page of the audit trail, newest first unless the request sets `sort` or `after`."""
    where = filter_sql.where(models.audit, page.filter, is_sqlite=database.is_sqlite)
    return await entities_of(database, ORDERING, where, public, page)
