"""What admins did to accounts: a row in the same transaction as what was done, and an event for admins.

The rows are kept for good, also when the account is deleted. So they hold nothing personal: of a name, an address or
a date they say that it changed, not what it was and is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import insert

import models
from core.identity import Group
from core.times import utc_now
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic import filter_sql
from repository.generic.lists import Listed, ListRequest, entities_of, entity, total_order

AUDIENCE = f"group:{Group.ADMIN}"
_TOLD = frozenset({"group", "is_active", "awaits_activation", "has_profile"})
_BOOKKEEPING = frozenset({"version", "updated_at"})


def public(row: Mapping[str, Any]) -> dict[str, Any]:
    return dict(row)


async def record(
    tx: Transaction, action: str, user_id: int, *, actor_id: int | None, address: str | None, changes: Mapping[str, Any]
) -> None:
    """`changes` names what became different, `{"group": ["user", "admin"]}`: as it was and as it is, or an empty list
    for what is personal. `actor_id` is None for what was done outside of the service, by whoever runs it.
    """
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


async def record_changes(
    tx: Transaction,
    action: str,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    actor_id: int,
    address: str | None,
) -> None:
    """Record what differs of an account, before and after, both as admins see it; nothing when nothing does."""
    changed = [name for name in after if name not in _BOOKKEEPING and before[name] != after[name]]
    if changed:
        changes = {name: [before[name], after[name]] if name in _TOLD else [] for name in changed}
        await record(tx, action, after["id"], actor_id=actor_id, address=address, changes=changes)


async def page_of(database: Database, page: ListRequest) -> Listed[dict[str, Any]]:
    """A page of the trail: the newest first, unless it is sorted or walked by key."""
    where = filter_sql.where(models.audit, page.filter, is_sqlite=database.is_sqlite)
    order = page.sort or ((("id", page.after is None),))
    return await entities_of(
        database,
        models.audit,
        where,
        total_order(order),
        public,
        offset=page.offset,
        limit=page.limit,
        after=page.after,
    )
