"""The audit trail: one row for each admin action on an account, stored with the action and sent to admins as an event.

Entries are kept forever, even after the account is deleted. So they hold no personal data of its owner: for a name, an
address or a date of birth, an entry says that the value changed, not what it was or is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import insert

import models
from core.identity import Group
from core.times import utc_now
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic import filter_sql
from repository.generic.cursors import Ordering
from repository.generic.lists import Listed, ListRequest, entities_of, entity, total_order
from repository.generic.versions import BOOKKEEPING, Row, changed_names

AUDIENCE = f"group:{Group.ADMIN}"
ORDERING = Ordering(models.audit, lambda sort, after: total_order(sort or (("id", after is None),)))
_NOT_PERSONAL = frozenset({"group", "is_active", "awaits_activation", "has_profile"})


@dataclass(frozen=True, slots=True)
class Editor:
    """The user who edits, and their IP address. `is_admin` is set only when admin rights permit the edit."""

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
    values = {
        "actor_id": actor_id,
        "action": action,
        "user_id": user_id,
        "changes": dict(changes),
        "address": address,
        "created_at": utc_now(),
    }
    stored = await tx.connection.execute(insert(models.audit).values(values).returning(models.audit))
    tx.emit("audit", "add", public(entity(stored.one())), actor_id=actor_id, audience=AUDIENCE)


async def record_changes(tx: Transaction, action: str, before: Row, after: Row, editor: Editor) -> None:
    """Record the difference between two public forms of an account; do nothing when there is none."""
    changed = [name for name in changed_names(before, after) if name not in BOOKKEEPING]
    if changed:
        changes = {name: [before[name], after[name]] if name in _NOT_PERSONAL else [] for name in changed}
        await record(tx, action, after["id"], editor, changes)


async def page_of(database: Database, page: ListRequest) -> Listed[dict[str, Any]]:
    """Return a page of the audit trail, newest first unless the request sets `sort` or `after`."""
    where = filter_sql.where(models.audit, page.filter, is_sqlite=database.is_sqlite)
    return await entities_of(database, ORDERING, where, public, page)
