"""Sign-in sessions: a row from signing in until leaving. Its id is the claim `sid` of the tokens.

Of the refresh tokens of a session one is good, the last one that was given out. Whoever shows an older one is not the
only one who has it: the session ends, and with it every token that came of that sign-in.

What its owner can list has no end yet (`ended_at`), and every beginning and end is an event for the owner alone. A
session that merely runs out is still listed until the clean-up ends it, for a clock can send no event.
"""

from __future__ import annotations

import hmac
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, delete, func, insert, select, update

import models
from core.errors import Forbidden, NotFound, Unauthenticated
from core.identity import CLOCK_LEEWAY_SECONDS, Claims
from core.times import utc_now, utc_text
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic.lists import Listed, entities_of, entity

MAX_SESSIONS_PER_USER = 1_000
MAX_USER_AGENT_LENGTH = 255
KNOWN_ADDRESS_DAYS = 30
WRONG_PASSWORD = "The name or the password is wrong"  # noqa: S105 (no password)
BAD_REFRESH_TOKEN = "The refresh token is not valid or has expired"  # noqa: S105
AWAITS_ACTIVATION = (
    "The account waits for its activation: follow the link in the mail, or ask for another one"
    " (POST /auth/activate/resend)"
)
DISABLED = "This account is disabled"
_PUBLIC = ("id", "user_id", "user_agent", "address", "created_at", "last_used_at")


@dataclass(frozen=True, slots=True)
class Checked:
    """A password that was right: the hash that it was checked against, and a new one if that has other parameters."""

    password_hash: str
    new_hash: str | None = None


@dataclass(frozen=True, slots=True)
class Renewal:
    """The refresh token that is the good one from now on."""

    refresh_id: str
    lifetime_seconds: int


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


async def begin(
    tx: Transaction, user_id: int, device: Device, checked: Checked, renewal: Renewal
) -> dict[str, Any] | None:
    """Store a session. With MAX_SESSIONS_PER_USER of them the oldest ends.

    None when there is another password than the one that was checked: check again. Raises Unauthenticated when the
    account is gone, Forbidden when it waits for its activation or is disabled.
    """
    table = models.sessions
    people = models.users.c
    # Whoever disables the account or changes its password takes the same lock: it finds this session and ends it, or
    # we find what it did.
    found = await tx.connection.execute(
        select(people.is_active, people.awaits_activation, people.deleted_at, people.password_hash)
        .where(people.id == user_id)
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
        # Nothing that shows has changed: no event, and the version stays.
        await tx.connection.execute(
            update(models.users).where(people.id == user_id).values(password_hash=checked.new_hash)
        )
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
        "ended_at": None,
        "last_used_at": utc_text(now),
        "refresh_id": renewal.refresh_id,
    }
    await tx.connection.execute(insert(table).values(values))
    session = public(values)
    tx.emit("sessions", "add", session, actor_id=user_id, audience=audience(user_id))
    return session


def _end_of(renewal: Renewal, now: datetime) -> str:
    return utc_text(now + timedelta(seconds=renewal.lifetime_seconds + CLOCK_LEEWAY_SECONDS))


async def refresh(tx: Transaction, claims: Claims, address: str | None, renewal: Renewal) -> dict[str, Any] | None:
    """Put `renewal` in the place of the session's refresh token, which `claims` are of.

    None when they are of an older one: the session has been ended, which only COMMIT makes true. Raises Unauthenticated
    when the session is over or the account is not in use.
    """
    table, people = models.sessions, models.users.c
    # The row is locked: of two who come with the same token the second finds the first one's.
    found = await tx.connection.execute(
        select(table)
        .join(models.users, people.id == table.c.user_id)
        .where(_of(claims.user_id, claims.session_id), goes_on(), people.is_active, people.deleted_at.is_(None))
        .with_for_update(of=table)
    )
    row = found.one_or_none()
    if row is None:
        raise Unauthenticated(BAD_REFRESH_TOKEN)
    before = entity(row)
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
    await tx.connection.execute(update(table).where(table.c.id == claims.session_id).values(values))
    was, session = public(before), public(before | values)
    changed = [name for name, value in session.items() if was[name] != value]
    to = audience(claims.user_id)
    tx.emit("sessions", "update", session, actor_id=claims.user_id, before=was, changed=changed, audience=to)
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
    """End all sessions of the user but one, or all.

    Whoever does it because of a new password writes the password first: a sign-in with the old one then either is among
    these sessions, or finds the new password (`begin`).
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
    """Delete sessions that have ended, whose last token is no good any more, and whose address is known no longer."""
    table = models.sessions

    async def work(tx: Transaction) -> int:
        is_over = (table.c.expires_at < utc_text(now)) & table.c.ended_at.is_not(None)
        is_old = table.c.last_used_at < utc_text(now - timedelta(days=KNOWN_ADDRESS_DAYS))
        return int((await tx.connection.execute(delete(table).where(is_over & is_old))).rowcount)

    return await database.write(work)


async def recent_addresses(database: Database, user_id: int) -> frozenset[str]:
    """From where the user's newest MAX_SESSIONS_PER_USER sessions were begun or last refreshed, if that was in the last
    KNOWN_ADDRESS_DAYS.
    """
    table = models.sessions
    since = utc_text(datetime.now(UTC) - timedelta(days=KNOWN_ADDRESS_DAYS))
    # Asked for at each attempt to sign in: somebody with a great many sessions must not make that slow.
    newest_ones = (
        select(table.c.address, table.c.last_used_at)
        .where(table.c.user_id == user_id)
        .order_by(table.c.created_at.desc())
        .limit(MAX_SESSIONS_PER_USER)
        .subquery()
    )
    found = select(newest_ones.c.address).where(newest_ones.c.last_used_at >= since).distinct()
    async with database.read() as connection:
        return frozenset(each for each in (await connection.execute(found)).scalars() if each is not None)


async def newest(database: Database, user_id: int, *, offset: int, limit: int) -> Listed[dict[str, Any]]:
    """A page of the user's sessions that go on, newest first."""
    table = models.sessions
    where = (table.c.user_id == user_id) & table.c.ended_at.is_(None)
    order = (("created_at", True), ("id", False))
    return await entities_of(database, table, where, order, public, offset=offset, limit=limit)
