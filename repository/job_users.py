"""The users of jobs: every transaction of a job that needs rights reads and locks those that its user has then."""

from __future__ import annotations

from sqlalchemy import select

import models
from core.errors import Forbidden
from core.identity import Group, Identity
from repository.engine.transaction import Transaction
from repository.generic.rows import one


class RightsLost(Forbidden):
    """The user of a job may no longer write at all."""


async def identity_of(tx: Transaction, user_id: int | None) -> Identity:
    """Return the user of a job with the rights that the user has now, locked until COMMIT. Raises RightsLost."""
    users = models.users.c
    query = select(users.group, users.is_active, users.deleted_at, users.username).where(users.id == user_id)
    found = await one(tx.connection, query.with_for_update(read=True))
    if found is None or found["deleted_at"] is not None or not found["is_active"]:
        raise RightsLost("The account of the user was deleted or deactivated")
    assert user_id is not None
    return Identity(user_id, Group(found["group"]), float("inf"), "", found["username"])
