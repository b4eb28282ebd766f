"""Deleting accounts: what is somebody's own goes, what they listed stays and names a number that nobody has any more.

All of it in one transaction: sessions end, so that sockets close, jobs are cancelled, links and mails are taken back,
and the row keeps nothing but its number. The user name and the address are free again.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Select, delete, exists, func, select, update

import models
from core.errors import NotFound, PreconditionFailed
from core.identity import Group
from core.times import utc_now, utc_text
from repository import jobs
from repository.accounts import audit, one_time_tokens, outbox, sessions, users
from repository.accounts.edits import Editor
from repository.accounts.one_time_tokens import DAYS_TO_ACTIVATE
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic.lists import entity
from repository.generic.versions import IfMatch

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
    """Delete accounts that nobody has activated within `DAYS_TO_ACTIVATE` before `now` (an aware time). Answers how
    many: 0 when there are no more.

    Those whose link is still good, or waits to be sent, stay until the next time, and so do those whom an admin has put
    into another group or given a picture: somebody wants them.
    """
    late = late_accounts(now, max_rows)
    async with database.read() as connection:
        # A look without a lock first: nearly always there are none.
        if (await connection.execute(late)).first() is None:
            return 0

    async def work(tx: Transaction) -> int:
        # Locked first: what is asked of them after that, whoever had them before us has committed.
        held = (await tx.connection.execute(late.with_for_update(of=models.users))).scalars().all()
        is_held = models.users.c.id.in_(held)
        still = select(models.users).where(is_held, models.users.c.awaits_activation, ~_has_a_link(now), ~_has_a_mail())
        rows = (await tx.connection.execute(still.order_by(models.users.c.id))).all()
        for row in rows:
            await _empty(tx, entity(row), actor_id=None)
        return len(rows)

    return await database.write(work)


def _has_a_link(now: datetime) -> ColumnElement[bool]:
    tokens = models.one_time_tokens
    return exists().where(tokens.c.user_id == models.users.c.id, tokens.c.expires_at > utc_text(now))


def _has_a_mail() -> ColumnElement[bool]:
    return exists().where(models.mails.c.user_id == models.users.c.id, models.mails.c.due_at.is_not(None))


def late_accounts(now: datetime, max_rows: int) -> Select[tuple[int]]:
    """The numbers of accounts that `forget_waiting` may delete, in the order of their index."""
    table = models.users
    return (
        select(table.c.id)
        .where(
            table.c.awaits_activation,
            table.c.created_at < utc_text(now - timedelta(days=DAYS_TO_ACTIVATE)),
            table.c.group == Group.USER.value,
            func.coalesce(table.c.avatar, "") == "",  # said so, SQLite does not take the index of avatars
            ~_has_a_link(now),
            ~_has_a_mail(),
        )
        .order_by(table.c.created_at, table.c.id)
        .limit(max_rows)
    )


async def _empty(tx: Transaction, before: Mapping[str, Any], *, actor_id: int | None) -> None:
    """Leave nothing of an account, whose row is locked, but its number."""
    user_id = before["id"]
    await jobs.cancel_all(tx, user_id)
    await sessions.end_all(tx, user_id, actor_id=actor_id)
    await one_time_tokens.void(tx, user_id)
    await outbox.withdraw(tx, user_id)
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
