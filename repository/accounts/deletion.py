"""Deleting accounts: personal data is erased; the movies, characters, comments and ratings of the user keep the id.

One transaction ends the sessions (which closes the sockets), cancels the jobs, revokes tokens, withdraws emails,
deletes the watchlist and empties the row except for its id. The user name and the email can then be used by another
account.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime, timedelta

from sqlalchemy import Select, delete, func, select, tuple_, update

import models
from core.errors import Unavailable
from core.identity import Group
from core.times import utc_now, utc_text
from repository import jobs
from repository.accounts import audit, one_time_tokens, outbox, sessions, users
from repository.accounts.audit import Editor
from repository.accounts.one_time_tokens import DAYS_TO_ACTIVATE, LIFETIME_HOURS
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic.rows import delete_without_events, entity
from repository.generic.versions import IfMatch, Row

# Tables that may have very many rows of one account.
PERSONAL = (models.sessions, models.idempotency_keys)
# The transaction that deletes an account erases at most this many rows of each table, because other writes wait for
# the transaction to end.
ERASED_ROWS = 5_000
# The last activation URL may be mailed DAYS_TO_ACTIVATE after registration, and is valid for LIFETIME_HOURS.
KEPT_WAITING = timedelta(days=DAYS_TO_ACTIVATE, hours=LIFETIME_HOURS)

# No password has this hash.
NO_PASSWORD = "deleted"  # noqa: S105 (no password)
# Every nullable column is set to null, so that no personal data is overlooked.
_EMPTIED = [str(column.name) for column in models.users.columns if column.nullable]


async def remove(tx: Transaction, editor: Editor, user_id: int, if_match: IfMatch) -> str | None:
    """Delete an account: the editor's own, or any account for an admin.

    Return its avatar, whose files can be deleted, or None if there is none. Raises Forbidden, NotFound,
    PreconditionFailed, or Conflict for the last admin.
    """
    is_own = editor.user_id == user_id
    locked = await users.lock_with_admins(tx, user_id, if_match, admin_id=None if is_own else editor.user_id)
    locked.require_another_admin()
    await _empty(tx, locked.row, actor_id=editor.user_id)
    if not is_own or user_id in locked.admins:
        await audit.record(tx, "delete", user_id, editor, {})
    avatar: str | None = locked.row["avatar"]
    return avatar


async def erase_rest(database: Database, user_id: int) -> None:
    """Erase, in several transactions, the personal rows of a deleted account that were too many for `remove`.

    If the process ends or the database is unavailable, the clean-up deletes the remaining rows when they expire.
    """
    with suppress(Unavailable):
        for table in PERSONAL:
            await delete_without_events(database, table, table.c.user_id == user_id)


async def forget_waiting(database: Database, now: datetime, *, max_rows: int) -> int:
    """Delete up to `max_rows` accounts that still await activation `KEPT_WAITING` after registration.

    `now` is timezone-aware. Return how many were deleted. After this time, every activation URL has expired. A newer
    reset URL does not prolong the time: only an account whose address was free can have one, so if the account were
    kept for longer, a sign-in would reveal that the address was free. Accounts that an admin has moved to another group
    or given a picture stay, because an admin evidently wants them kept.
    """
    late = late_accounts(now, max_rows)
    # Check without a lock first, because there is nearly always nothing to delete.
    if not await database.select(late):
        return 0

    async def work(tx: Transaction) -> int:
        # Lock before checking the condition, so that it sees what the previous holders of the locks have committed.
        held = (await tx.connection.execute(late.with_for_update(of=models.users))).scalars().all()
        table = models.users
        still = select(table).where(table.c.id.in_(held), table.c.awaits_activation).order_by(table.c.id)
        rows = (await tx.connection.execute(still)).all()
        for row in rows:
            await _empty(tx, entity(row), actor_id=None)
        return len(rows)

    return await database.write(work)


def late_accounts(now: datetime, max_rows: int) -> Select[tuple[int]]:
    """Return the query for the ids of accounts that `forget_waiting` may delete, ordered as in `ix_users_awaiting`."""
    table = models.users
    return (
        select(table.c.id)
        .where(
            table.c.awaits_activation,
            table.c.created_at < utc_text(now - KEPT_WAITING),
            table.c.group == Group.USER.value,
            # The condition is written in this way so that SQLite does not choose the index of the column `avatar`.
            func.coalesce(table.c.avatar, "") == "",
        )
        .order_by(table.c.created_at, table.c.id)
        .limit(max_rows)
    )


async def _empty(tx: Transaction, before: Row, *, actor_id: int | None) -> None:
    """Erase everything about an account except its id, and emit the delete event. The caller holds the row's lock."""
    user_id = before["id"]
    await jobs.cancel_all(tx, user_id)
    await sessions.end_all(tx, user_id, actor_id=actor_id)
    await one_time_tokens.void(tx, user_id)
    await outbox.withdraw(tx, user_id)
    for table in PERSONAL:
        some = tuple_(*table.primary_key.columns).in_(
            select(*table.primary_key.columns).where(table.c.user_id == user_id).limit(ERASED_ROWS)
        )
        await tx.connection.execute(delete(table).where(some))
    # The sockets that could see these rows are closed, so there is no event.
    await tx.connection.execute(delete(models.watchlist).where(models.watchlist.c.user_id == user_id))
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
    users.announce(tx, "delete", shown, actor_id, before=shown)
