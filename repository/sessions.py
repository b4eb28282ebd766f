"""Sign-in sessions: a row from signing in until leaving. Its id is the claim `sid` of the access tokens.

What its owner can list has no end yet (`ended_at`), and every beginning and end is an event for the owner alone. A
session that merely runs out is still listed until the clean-up ends it, for a clock can send no event.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, delete, func, insert, select, update

import models
from errors import NotFound, Unauthenticated
from repository.database import Database
from repository.lists import Listed, entities_of, entity
from repository.transaction import Transaction
from security import CLOCK_LEEWAY_SECONDS
from times import utc_now, utc_text

MAX_SESSIONS_PER_USER = 1_000
MAX_USER_AGENT_LENGTH = 255
_PUBLIC = ("id", "user_id", "user_agent", "address", "created_at", "last_used_at")


@dataclass(frozen=True, slots=True)
class Device:
    """Where somebody signs in from, as far as one can tell."""

    user_agent: str | None
    address: str | None


def public(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in _PUBLIC}


def goes_on() -> ColumnElement[bool]:
    return models.sessions.c.ended_at.is_(None)


def audience(user_id: int) -> str:
    return f"user:{user_id}"


async def begin(tx: Transaction, user_id: int, device: Device, lifetime_seconds: int) -> dict[str, Any]:
    """Store a session. With MAX_SESSIONS_PER_USER of them the oldest ends. Raises Unauthenticated when the account was
    disabled since the password was checked.
    """
    table = models.sessions
    # Whoever disables the account takes the same lock: it finds this session and ends it, or we find it disabled.
    standing = await tx.connection.execute(
        select(models.users.c.is_active).where(models.users.c.id == user_id).with_for_update(key_share=True)
    )
    if not standing.scalar():
        raise Unauthenticated("The name or the password is wrong")
    await _make_room(tx, user_id)
    now = datetime.now(UTC)
    user_agent = (device.user_agent or "").replace("\x00", "")[:MAX_USER_AGENT_LENGTH]
    values = {
        "id": str(uuid.uuid4()),
        "user_id": user_id,
        "user_agent": user_agent or None,
        "address": device.address,
        "created_at": utc_text(now),
        "expires_at": utc_text(now + timedelta(seconds=lifetime_seconds + CLOCK_LEEWAY_SECONDS)),
        "ended_at": None,
        "last_used_at": utc_text(now),
        "refresh_id": None,
    }
    await tx.connection.execute(insert(table).values(values))
    session = public(values)
    tx.emit("sessions", "add", session, actor_id=user_id, audience=audience(user_id))
    return session


async def _make_room(tx: Transaction, user_id: int) -> None:
    table = models.sessions
    going_on = (table.c.user_id == user_id) & table.c.ended_at.is_(None)
    count = (await tx.connection.execute(select(func.count()).select_from(table).where(going_on))).scalar_one()
    if count >= MAX_SESSIONS_PER_USER:
        oldest = select(table.c.id).where(going_on).order_by(table.c.created_at, table.c.id)
        surplus = await tx.connection.execute(oldest.limit(count - MAX_SESSIONS_PER_USER + 1))
        await _end(tx, table.c.id.in_(surplus.scalars().all()), actor_id=user_id)


async def _end(tx: Transaction, which: ColumnElement[bool], actor_id: int | None, limit: int | None = None) -> int:
    """End those that go on, each with its event. Answers how many."""
    table = models.sessions
    found = await tx.connection.execute(
        # In one order, so that two who end the same ones do not wait for each other.
        select(table).where(which, table.c.ended_at.is_(None)).order_by(table.c.id).limit(limit).with_for_update()
    )
    ended = [entity(row) for row in found]
    if ended:
        await tx.connection.execute(
            update(table).where(table.c.id.in_([row["id"] for row in ended])).values(ended_at=utc_now())
        )
    for row in ended:
        session = public(row)
        to = audience(row["user_id"])
        tx.emit("sessions", "delete", session, actor_id=actor_id, before=session, audience=to)
    return len(ended)


async def leave(tx: Transaction, user_id: int, session_id: str) -> None:
    """End one's session; leaving twice is no error."""
    await _end(tx, _of(user_id, session_id), actor_id=user_id)


async def end(tx: Transaction, user_id: int, session_id: str) -> None:
    """End a session of this user. Raises NotFound, also for somebody else's and for one that has ended."""
    if not await _end(tx, _of(user_id, session_id), actor_id=user_id):
        raise NotFound(f"You have no session {session_id}")


def _of(user_id: int, session_id: str) -> ColumnElement[bool]:
    return (models.sessions.c.id == session_id) & (models.sessions.c.user_id == user_id)


async def end_all(tx: Transaction, user_id: int, *, actor_id: int | None) -> int:
    return await _end(tx, models.sessions.c.user_id == user_id, actor_id)


async def end_others(tx: Transaction, user_id: int, keep_session_id: str | None, *, actor_id: int | None) -> int:
    """End all sessions of the user but one, or all. Whoever does it because of a new password writes the password first:
    a sign-in with the old one then either is among these sessions, or finds the new password (`begin`).
    """
    which = models.sessions.c.user_id == user_id
    if keep_session_id is not None:
        which &= models.sessions.c.id != keep_session_id
    return await _end(tx, which, actor_id)


async def expire(database: Database, now: datetime, *, max_rows: int) -> int:
    """End up to `max_rows` sessions whose last token was no good any more at `now` (an aware time)."""

    async def work(tx: Transaction) -> int:
        return await _end(tx, models.sessions.c.expires_at < utc_text(now), actor_id=None, limit=max_rows)

    return await database.write(work)


async def forget(database: Database, now: datetime) -> int:
    """Delete sessions that have ended and whose last token is no good any more: nobody can list them or come back."""
    table = models.sessions

    async def work(tx: Transaction) -> int:
        is_over = (table.c.expires_at < utc_text(now)) & table.c.ended_at.is_not(None)
        return int((await tx.connection.execute(delete(table).where(is_over))).rowcount)

    return await database.write(work)


async def newest(database: Database, user_id: int, *, offset: int, limit: int) -> Listed[dict[str, Any]]:
    """A page of the user's sessions that go on, newest first."""
    table = models.sessions
    where = (table.c.user_id == user_id) & table.c.ended_at.is_(None)
    order = (("created_at", True), ("id", False))
    return await entities_of(database, table, where, order, public, offset=offset, limit=limit)
