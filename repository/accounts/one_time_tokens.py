"""What links in mails carry: random, good once and for a day, and kept only as digests.

Each purpose has its own tokens; one for resetting a password activates nothing. A token proves that somebody reads the
mails of the address it was sent to (`Taken.email`), and is worth nothing for an account that has another address by
then. Whoever changes or deletes an account takes its tokens back with `void`, in the same transaction.
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
from repository.engine.database import Database
from repository.engine.transaction import Transaction

LIFETIME_HOURS = 24
DAYS_TO_ACTIVATE = 7  # then nobody gets a link to do it any more, and soon the account goes
TOKEN_BYTES = 32


class Purpose(StrEnum):
    ACTIVATE = "activate"
    RESET = "reset"
    EMAIL = "email"  # make the address that it was mailed to the account's


@dataclass(frozen=True, slots=True)
class Taken:
    """Whose token it was, and the address that it was mailed to."""

    purpose: Purpose
    user_id: int
    email: str


def _digest(token: str) -> str:
    # No salt and no slow hash: nobody guesses 32 random bytes.
    return hashlib.sha256(token.encode()).hexdigest()


def _is(token: str, purposes: tuple[Purpose, ...]) -> ColumnElement[bool]:
    table = models.one_time_tokens
    # Looked for by its digest, a guess learns nothing from how long the comparison took.
    return (table.c.digest == _digest(token)) & table.c.purpose.in_(purposes) & (table.c.expires_at > utc_now())


async def mint(tx: Transaction, purpose: Purpose, user_id: int, email: str) -> str:
    """A new token for a mail to `email`. The text is nowhere but in the answer."""
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
    await tx.connection.execute(insert(models.one_time_tokens).values(values))
    return token


async def find(database: Database, token: str, *purposes: Purpose) -> Taken | None:
    """Whose token it is, without using it up: for what is checked before the transaction that takes it."""
    table = models.one_time_tokens
    async with database.read() as connection:
        found = await connection.execute(
            select(table.c.purpose, table.c.user_id, table.c.email).where(_is(token, purposes))
        )
        row = found.one_or_none()
        return Taken(Purpose(row[0]), row[1], row[2]) if row is not None else None


async def take(tx: Transaction, token: str, *purposes: Purpose) -> Taken | None:
    """Use a token up. Of two who take it at once, one gets None, as everybody does for what is no good."""
    table = models.one_time_tokens
    found = await tx.connection.execute(
        delete(table).where(_is(token, purposes)).returning(table.c.purpose, table.c.user_id, table.c.email)
    )
    row = found.one_or_none()
    return Taken(Purpose(row[0]), row[1], row[2]) if row is not None else None


async def void(tx: Transaction, user_id: int, *purposes: Purpose) -> None:
    """Take the account's tokens of these purposes back, or all of them when none is named."""
    table = models.one_time_tokens
    which = table.c.user_id == user_id
    if purposes:
        which &= table.c.purpose.in_(purposes)
    await tx.connection.execute(delete(table).where(which))


async def forget(database: Database, now: datetime) -> int:
    """Delete what has expired at `now` (an aware time). Answers how many."""
    table = models.one_time_tokens

    async def work(tx: Transaction) -> int:
        return int((await tx.connection.execute(delete(table).where(table.c.expires_at < utc_text(now)))).rowcount)

    return await database.write(work)
