"""What admins did to accounts: a row in the same transaction as what was done, and an event for admins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import insert

import models
from repository.lists import entity
from repository.transaction import Transaction
from security import Group
from times import utc_now

AUDIENCE = f"group:{Group.ADMIN}"


def public(row: Mapping[str, Any]) -> dict[str, Any]:
    return dict(row)


async def record(
    tx: Transaction, action: str, user_id: int, *, actor_id: int, address: str | None, changes: Mapping[str, Any]
) -> None:
    """`changes` names what became different, `{"group": ["user", "admin"]}`: as it was and as it is. No secrets."""
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
