"""Sessions: one row per sign-in. A session's id is the claim `sid` of its tokens.

A session has one valid refresh token, the last one issued. An older one is treated as stolen: presenting it ends the
session, and with it every token issued from that sign-in.

The owner can list sessions that have not ended (`ended_at` is null), and each start, refresh and end is an event for
the owner alone. An expired session stays listed until the clean-up ends it, because expiry alone sends no event.
"""

from __future__ import annotations

import hmac
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, func, insert, select, update

import models
from core.errors import Forbidden, NotFound, Unauthenticated, invalid_token
from core.identity import CLOCK_LEEWAY_SECONDS, Claims, audience_of_user
from core.times import utc_now, utc_text
from repository.engine import rights
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic.cursors import Cursor, Ordering
from repository.generic.lists import Listed, ListRequest, entities_of
from repository.generic.rows import delete_without_events, entity, one
from repository.generic.versions import Row, changed_names
from resources.accounts.credentials import Session

MAX_SESSIONS_PER_USER = 1_000
MAX_USER_AGENT_LENGTH = 255
KNOWN_ADDRESS_DAYS = 30
WRONG_PASSWORD = "Incorrect user name, email or password"  # noqa: S105 (no password)
AWAITS_ACTIVATION = (
    "The account is not activated yet: open the activation URL in the email, or request a new one"
    " (POST /auth/activate/resend)"
)
DISABLED = "This account is disabled"
TABLE = models.sessions
ORDERING = Ordering(TABLE, lambda sort, after: (("created_at", True), ("id", False)))


@dataclass(frozen=True, slots=True)
class Checked:
    """A correct password: the hash that it matched, and a new hash if the parameters of that hash are outdated."""

    password_hash: str
    new_hash: str | None = None


@dataclass(frozen=True, slots=True)
class Renewal:
    """The new refresh token of a session, which replaces any earlier one."""

    refresh_id: str
    lifetime_seconds: int


@dataclass(frozen=True, slots=True)
class Device:
    """The client that signs in, as far as it is known."""

    user_agent: str | None
    address: str | None


def public(row: Row) -> dict[str, Any]:
    """Return the session as its owner sees it."""
    return {name: row[name] for name in Session.model_fields}


def goes_on() -> ColumnElement[bool]:
    """Return the condition for sessions that have not ended."""
    return TABLE.c.ended_at.is_(None)


async def begin(
    tx: Transaction, user_id: int, device: Device, checked: Checked, renewal: Renewal
) -> dict[str, Any] | None:
    """Store a session and return its `public` form. The oldest session ends when the user has MAX_SESSIONS_PER_USER.

    Return None when the password has changed since it was checked; the caller then checks it again. Raises
    Unauthenticated when the account no longer exists, or Forbidden when it awaits activation or is disabled.
    """
    accounts = models.users.c
    # Disabling the account and changing its password take the same lock: either they end this session, or we see
    # their result.
    found = await tx.connection.execute(
        select(accounts.is_active, accounts.awaits_activation, accounts.deleted_at, accounts.password_hash)
        .where(accounts.id == user_id)
        .with_for_update(key_share=True)
    )
    standing = found.one_or_none()
    if standing is None or standing.deleted_at is not None:
        raise Unauthenticated(WRONG_PASSWORD)
    if not hmac.compare_digest(standing.password_hash, checked.password_hash):
        return None
    if not standing.is_active:
        raise Forbidden(AWAITS_ACTIVATION if standing.awaits_activation else DISABLED)
    if checked.new_hash is not None:
        # The new hash is not visible to clients, so there is no event and the version stays the same.
        renewed = update(models.users).where(accounts.id == user_id).values(password_hash=checked.new_hash)
        await tx.connection.execute(renewed)
    await _make_room(tx, user_id)
    now = datetime.now(UTC)
    user_agent = (device.user_agent or "").replace("\x00", "")[:MAX_USER_AGENT_LENGTH]
    values = {
        "id": str(uuid.uuid4()),
        "user_id": user_id,
        "user_agent": user_agent or None,
        "address": device.address,
        "created_at": utc_text(now),
        "expires_at": _end_of(renewal, now),
        "last_used_at": utc_text(now),
        "refresh_id": renewal.refresh_id,
    }
    await tx.connection.execute(insert(TABLE).values(values))
    session = public(values)
    _announce(tx, "add", session, user_id)
    return session


def _announce(
    tx: Transaction, operation: str, session: dict[str, Any], actor_id: int | None, before: dict[str, Any] | None = None
) -> None:
    """Emit an event to the session's owner alone."""
    changed = changed_names(before, session) if before is not None else ()
    audience = audience_of_user(session["user_id"])
    tx.emit("sessions", operation, session, actor_id=actor_id, before=before, changed=changed, audience=audience)


def _end_of(renewal: Renewal, now: datetime) -> str:
    return utc_text(now + timedelta(seconds=renewal.lifetime_seconds + CLOCK_LEEWAY_SECONDS))


async def refresh(tx: Transaction, claims: Claims, address: str | None, renewal: Renewal) -> dict[str, Any] | None:
    """Replace the session's refresh token, given by `claims`, with `renewal` and return the session.

    Return None when `claims` are those of an older token. The session has then been ended, so the caller must commit.
    Raises Unauthenticated when the session has ended or the account is not active.
    """
    accounts = models.users.c
    # The row is locked, so the second of two requests with the same token finds the token that replaced it.
    before = await one(
        tx.connection,
        select(TABLE)
        .join(models.users, accounts.id == TABLE.c.user_id)
        .where(_of(claims.user_id, claims.session_id), goes_on(), accounts.is_active, accounts.deleted_at.is_(None))
        .with_for_update(of=TABLE),
    )
    if before is None:
        raise invalid_token("refresh")
    if not hmac.compare_digest((before["refresh_id"] or "").encode(), claims.token_id.encode()):
        await _end(tx, _of(claims.user_id, claims.session_id), actor_id=claims.user_id)
        return None
    now = datetime.now(UTC)
    values = {
        "refresh_id": renewal.refresh_id,
        "expires_at": _end_of(renewal, now),
        "last_used_at": utc_text(now),
        "address": address,
    }
    await tx.connection.execute(update(TABLE).where(TABLE.c.id == claims.session_id).values(values))
    was, session = public(before), public(before | values)
    _announce(tx, "update", session, claims.user_id, before=was)
    return session


async def _make_room(tx: Transaction, user_id: int) -> None:
    going_on = (TABLE.c.user_id == user_id) & goes_on()
    count = (await tx.connection.execute(select(func.count()).select_from(TABLE).where(going_on))).scalar_one()
    if count >= MAX_SESSIONS_PER_USER:
        oldest = select(TABLE.c.id).where(going_on).order_by(TABLE.c.created_at, TABLE.c.id)
        surplus = await tx.connection.execute(oldest.limit(count - MAX_SESSIONS_PER_USER + 1))
        await _end(tx, TABLE.c.id.in_(surplus.scalars().all()), actor_id=user_id)


async def _end(tx: Transaction, which: ColumnElement[bool], actor_id: int | None, limit: int | None = None) -> int:
    """End the matching sessions that have not ended, each with an event. Return how many were ended."""
    # The rows are locked in order of id, so that two transactions cannot deadlock.
    open_ones = select(TABLE).where(which, goes_on()).order_by(TABLE.c.id).limit(limit).with_for_update()
    ended = [entity(row) for row in await tx.connection.execute(open_ones)]
    if ended:
        ids = [row["id"] for row in ended]
        if tx.writer is not None and tx.writer.session_id in ids:
            await rights.spend(tx)
        await tx.connection.execute(update(TABLE).where(TABLE.c.id.in_(ids)).values(ended_at=utc_now()))
    for row in ended:
        _announce(tx, "delete", public(row), actor_id, before=public(row))
    return len(ended)


async def leave(tx: Transaction, user_id: int, session_id: str) -> None:
    """End the session at sign-out; do nothing when it has ended already."""
    await _end(tx, _of(user_id, session_id), actor_id=user_id)


async def end(tx: Transaction, user_id: int, session_id: str) -> None:
    """End a session of this user. Raises NotFound, also for another user's session and for one that has ended."""
    if not await _end(tx, _of(user_id, session_id), actor_id=user_id):
        raise NotFound(f"You have no session {session_id}")


def _of(user_id: int, session_id: str) -> ColumnElement[bool]:
    return (TABLE.c.id == session_id) & (TABLE.c.user_id == user_id)


async def end_all(tx: Transaction, user_id: int, *, actor_id: int | None) -> int:
    """End all sessions of the user. Return how many were ended."""
    return await _end(tx, TABLE.c.user_id == user_id, actor_id)


async def end_others(tx: Transaction, user_id: int, keep_session_id: str | None, *, actor_id: int | None) -> int:
    """End all sessions of the user except `keep_session_id`. Return how many were ended.

    A change of the password must write the new password before it calls this function. Then either a concurrent
    sign-in with the old password has already created one of these sessions, or `begin` finds that the password has
    changed.
    """
    which = TABLE.c.user_id == user_id
    if keep_session_id is not None:
        which &= TABLE.c.id != keep_session_id
    return await _end(tx, which, actor_id)


async def expire(database: Database, now: datetime, *, max_rows: int) -> int:
    """End at most `max_rows` of the sessions that had expired by `now` (timezone-aware). Return how many were ended."""
    has_expired = TABLE.c.expires_at < utc_text(now)
    return await database.write(lambda tx: _end(tx, has_expired, actor_id=None, limit=max_rows))


async def forget(database: Database, now: datetime) -> int:
    """Delete ended and expired sessions that are too old for `recent_addresses`. Return how many were deleted."""
    is_over = (TABLE.c.expires_at < utc_text(now)) & TABLE.c.ended_at.is_not(None)
    is_old = TABLE.c.last_used_at < utc_text(now - timedelta(days=KNOWN_ADDRESS_DAYS))
    return await delete_without_events(database, TABLE, is_over & is_old)


async def recent_addresses(database: Database, user_id: int) -> frozenset[str]:
    """Return the last IP addresses of the user's newest sessions, if used in the last KNOWN_ADDRESS_DAYS days."""
    since = utc_text(datetime.now(UTC) - timedelta(days=KNOWN_ADDRESS_DAYS))
    # Each attempt to sign in runs this query, so the number of rows is bounded.
    recent = (
        select(TABLE.c.address, TABLE.c.last_used_at)
        .where(TABLE.c.user_id == user_id)
        .order_by(TABLE.c.created_at.desc())
        .limit(MAX_SESSIONS_PER_USER)
        .subquery()
    )
    found = select(recent.c.address).where(recent.c.last_used_at >= since).distinct()
    return frozenset(row.address for row in await database.select(found) if row.address is not None)


async def newest(
    database: Database, user_id: int, *, offset: int, limit: int, cursor: Cursor | None = None
) -> Listed[dict[str, Any]]:
    """Return a page of the user's sessions that have not ended, newest first."""
    where = (TABLE.c.user_id == user_id) & goes_on()
    page = ListRequest(offset=offset, limit=limit, cursor=cursor)
    return await entities_of(database, ORDERING, where, public, page)
