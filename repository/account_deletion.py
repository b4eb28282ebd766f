"""Deleting accounts: what is somebody's own goes, what they listed stays and names a number that nobody has any more.

All of it in one transaction: sessions end, so that sockets close, jobs are cancelled, links and mails are taken back,
and the row keeps nothing but its number. The user name and the address are free again.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, exists, select, update

import models
from errors import NotFound, PreconditionFailed
from repository import audit, jobs, mails, one_time_tokens, sessions, users
from repository.account_edits import Editor
from repository.catalog import IfMatch
from repository.database import Database
from repository.lists import entity
from repository.transaction import Transaction
from security import Group
from times import utc_now, utc_text

# No password has this for its hash.
NO_PASSWORD = "deleted"  # noqa: S105 (no password)
_EMPTIED = (
    "username",
    "username_key",
    "email",
    "email_key",
    "name",
    "first_name",
    "last_name",
    "phone_number",
    "gender",
    "date_of_birth",
    "info",
    "avatar",
    "profile_created_at",
)


DAYS_TO_ACTIVATE = 7  # then an account that waits for its activation goes, and its name and address are free again


async def remove(tx: Transaction, editor: Editor, user_id: int, if_match: IfMatch) -> str | None:
    """Delete an account: one's own, or as an admin any. Answers its avatar, whose files nobody needs any more.

    Raises Forbidden, NotFound, PreconditionFailed, and Conflict for the last admin.
    """
    before, admins = await users.lock_among_admins(tx, user_id)
    if editor.user_id != user_id:
        users.require_admin(editor.user_id, admins)
    if before is None:
        raise NotFound(f"There is no user {user_id}")
    if if_match is not None and before["version"] not in if_match:
        raise PreconditionFailed(f"User {user_id} is at version {before['version']} now")
    users.require_another_admin(user_id, admins)
    await _empty(tx, before, actor_id=editor.user_id)
    if editor.user_id != user_id or user_id in admins:
        await audit.record(tx, "delete", user_id, actor_id=editor.user_id, address=editor.address, changes={})
    avatar: str | None = before["avatar"]
    return avatar


async def forget_waiting(database: Database, now: datetime, *, max_rows: int) -> int:
    """Delete accounts that nobody has activated within `DAYS_TO_ACTIVATE` before `now` (an aware time), those whose
    link is still good or on its way excepted. Answers how many: fewer than `max_rows` when there are no more.
    """
    table, tokens, outbox = models.users, models.one_time_tokens, models.mails
    link = exists().where(tokens.c.user_id == table.c.id, tokens.c.expires_at > utc_text(now))
    mail = exists().where(outbox.c.user_id == table.c.id, outbox.c.due_at.is_not(None))
    is_late = table.c.created_at < utc_text(now - timedelta(days=DAYS_TO_ACTIVATE))
    late = select(table).where(table.c.awaits_activation, is_late, ~link, ~mail).order_by(table.c.id).limit(max_rows)

    async def work(tx: Transaction) -> int:
        rows = (await tx.connection.execute(late.with_for_update(of=table))).all()
        for row in rows:
            await _empty(tx, entity(row), actor_id=None)
        return len(rows)

    return await database.write(work)


async def _empty(tx: Transaction, before: Mapping[str, Any], *, actor_id: int | None) -> None:
    """Leave nothing of an account, whose row is locked, but its number."""
    user_id = before["id"]
    await jobs.cancel_all(tx, user_id)
    await sessions.end_all(tx, user_id, actor_id=actor_id)
    await one_time_tokens.void(tx, user_id)
    await mails.withdraw(tx, user_id)
    for table in (models.sessions, models.idempotency_keys):
        await tx.connection.execute(delete(table).where(table.c.user_id == user_id))
    now = utc_now()
    kept = {
        **dict.fromkeys(_EMPTIED),
        "password_hash": NO_PASSWORD,
        "group": Group.USER.value,
        "is_active": False,
        "awaits_activation": False,
        "version": before["version"] + 1,
        "updated_at": now,
        "deleted_at": now,
    }
    await tx.connection.execute(update(models.users).where(models.users.c.id == user_id).values(kept))
    shown = users.public(before)
    users.announce(tx, "delete", shown, actor_id=actor_id, before=shown)
