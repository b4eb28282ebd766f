"""One-time tokens in emailed URLs: random, valid once and for a day, stored only as digests.

A token serves one purpose: an activation token cannot reset a password. It proves that its holder receives emails at
the address that the token was sent to (`OneTimeToken.email`). Callers reject an activation or reset token if the
account has another address by then. Code that changes or deletes an account revokes its tokens with `void`, in the same
transaction.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from sqlalchemy import ColumnElement, delete, insert, select

import models
from core.times import utc_now, utc_text
from repository.engine.database import Database, Rows
from repository.engine.transaction import Transaction
from repository.generic.rows import delete_without_events

LIFETIME_HOURS = 24
# Once this time has passed since registration, no more URLs are mailed to an account that is not activated. The
# clean-up deletes the account a day later.
DAYS_TO_ACTIVATE = 7
TOKEN_BYTES = 32
TABLE = models.one_time_tokens
_SHOWN = (TABLE.c.purpose, TABLE.c.user_id, TABLE.c.email)


class Purpose(StrEnum):
    ACTIVATE = "activate"
    RESET = "reset"
    EMAIL = "email"  # the purpose: give the account the address that the token was mailed to


@dataclass(frozen=True, slots=True)
class OneTimeToken:
    """What a token is for, the account that it belongs to, and the address that it was mailed to."""

    purpose: Purpose
    user_id: int
    email: str


def _digest(token: str) -> str:
    # 32 random bytes cannot be guessed, so the digest needs no salt and no slow hash.
    return hashlib.sha256(token.encode()).hexdigest()


def _is_valid(token: str, purposes: tuple[Purpose, ...]) -> ColumnElement[bool]:
    # The database compares digests, so the duration of the look-up tells an attacker nothing useful about tokens.
    return (TABLE.c.digest == _digest(token)) & TABLE.c.purpose.in_(purposes) & (TABLE.c.expires_at > utc_now())


async def mint(tx: Transaction, purpose: Purpose, user_id: int, email: str) -> str:
    """Store a new token to be mailed to `email` and return it; the database keeps only its digest."""
    token = secrets.token_urlsafe(TOKEN_BYTES)
    now = datetime.now(UTC)
    values = {
        "digest": _digest(token),
        "purpose": purpose.value,
        "user_id": user_id,
        "email": email,
        "created_at": utc_text(now),
        "expires_at": utc_text(now + timedelta(hours=LIFETIME_HOURS)),
    }
    await tx.connection.execute(insert(TABLE).values(values))
    return token


async def find(database: Database, token: str, *purposes: Purpose) -> OneTimeToken | None:
    """Return a token without using it up, for checks before `take`. Return None when the token is not valid."""
    return _token_of(await database.select(select(*_SHOWN).where(_is_valid(token, purposes))))


async def take(tx: Transaction, token: str, *purposes: Purpose) -> OneTimeToken | None:
    """Use up a token and return it, or None when it is not valid. Only one of two concurrent calls gets the token."""
    taken = delete(TABLE).where(_is_valid(token, purposes)).returning(*_SHOWN)
    return _token_of((await tx.connection.execute(taken)).all())


def _token_of(found: Rows) -> OneTimeToken | None:
    return OneTimeToken(Purpose(found[0].purpose), found[0].user_id, found[0].email) if found else None


async def void(tx: Transaction, user_id: int, *purposes: Purpose) -> None:
    """Revoke the account's tokens of these purposes, or all its tokens when no purpose is given."""
    which = TABLE.c.user_id == user_id
    if purposes:
        which &= TABLE.c.purpose.in_(purposes)
    await tx.connection.execute(delete(TABLE).where(which))


async def forget(database: Database, now: datetime) -> int:
    """Delete tokens that had expired by `now` (timezone-aware). Return how many were deleted."""
    return await delete_without_events(database, TABLE, TABLE.c.expires_at < utc_text(now))
