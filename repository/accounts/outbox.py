"""The outbox: emails are rows, stored in the same transaction as their cause and sent later by `jobs.mailer`.

- A row holds no token. The token is minted when a worker claims the row. So its digest is stored before the email is
  sent, and neither the outbox nor a backup of it gives access to an account.
- A claim is a lease, timed by the database's clock. When a worker dies, another one sends the email once the lease
  expires. So each email is sent at least once; a second copy has the `Message-ID` of the first.
- A request from an anonymous client stores only the address (`request`). The account is looked up when the row is
  claimed, so neither the response nor its duration reveals whether an account exists.
- If an email would prove an address that another account has, a notice to that account is sent instead. This, too, is
  decided when the row is claimed, so a registration with such an address, or a change to it, looks like any other.
- Sent emails are kept for a day, to count how many an account has received.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

import structlog
from sqlalchemy import ColumnElement, delete, func, insert, or_, select, update

import models
from core.identity import unique_key
from core.times import utc_now, utc_text
from repository.accounts import one_time_tokens, users
from repository.accounts.one_time_tokens import DAYS_TO_ACTIVATE, Purpose
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic.rows import delete_without_events, one
from repository.generic.versions import Row
from repository.leases import has_expired, now_in_seconds

# A lease lasts twice as long as a conversation with the mail server may take.
LEASE_SECONDS = 60.0
# With the pauses of `jobs.mailer`, the attempts take about two days.
MAX_ATTEMPTS = 56
MAX_WAITING_PER_USER = 20
# A limit for emails of one type to one account.
MAX_REQUESTED_PER_DAY = 5
# Twice the longest pause between attempts, to allow for jitter.
MAX_POSTPONED_SECONDS = 2 * 3600.0
REQUEST_PAUSE_SECONDS = 60.0
DAY = timedelta(days=1)
KEPT_WHEN_FAILED = timedelta(days=7)
TABLE = models.mails

log = structlog.get_logger("mails")


class MailType(StrEnum):
    ACTIVATE = "activate"
    RESET_PASSWORD = "reset_password"  # noqa: S105 (no password)
    # An email to a new address, which takes effect when the URL in the email is used.
    CONFIRM_EMAIL = "confirm_email"
    # An email to the old address when a change of address is requested.
    EMAIL_CHANGE_ASKED = "email_change_asked"
    PASSWORD_CHANGED = "password_changed"  # noqa: S105 (no password)
    # An email to the old address after a change of address.
    EMAIL_CHANGED = "email_changed"
    # An email to the owner of an address that another account tries to use.
    ADDRESS_TAKEN = "address_taken"


# The types of emails that carry a one-time token, with its purpose.
PURPOSES: Mapping[MailType, Purpose] = {
    MailType.ACTIVATE: Purpose.ACTIVATE,
    MailType.RESET_PASSWORD: Purpose.RESET,
    MailType.CONFIRM_EMAIL: Purpose.EMAIL,
}
# The types of emails whose token proves a new address of an account.
PROVING = frozenset({MailType.ACTIVATE, MailType.CONFIRM_EMAIL})


@dataclass(frozen=True, slots=True)
class ClaimedMail:
    """An email that this worker must send. `attempts` counts this attempt; `token` is set for the types in PURPOSES."""

    id: int
    kind: MailType
    recipient: str
    username: str | None
    created_at: str
    attempts: int
    token: str | None


# --- queueing


async def put(tx: Transaction, user_id: int, kind: MailType, recipient: str) -> bool:
    """Queue an email. Return False and log a warning when the account already has MAX_WAITING_PER_USER queued."""
    waiting = select(func.count()).select_from(TABLE).where(TABLE.c.user_id == user_id, TABLE.c.due_at.is_not(None))
    if (await tx.connection.execute(waiting)).scalar_one() >= MAX_WAITING_PER_USER:
        log.warning("email not queued; too many queued for the account", user_id=user_id, kind=kind.value)
        return False
    await _insert(tx, user_id, kind, recipient)
    return True


async def request(tx: Transaction, kind: MailType, address: str) -> None:
    """Queue an email to the account with this address. The same work is done when there is no such account."""
    await _insert(tx, None, kind, address)


async def _insert(tx: Transaction, user_id: int | None, kind: MailType, recipient: str) -> None:
    values: dict[str, Any] = {
        "user_id": user_id,
        "kind": kind.value,
        "recipient": recipient,
        "details": {},  # no email needs details so far
        "created_at": utc_now(),
        "due_at": now_in_seconds(is_sqlite=tx.is_sqlite),
        "attempts": 0,
    }
    await tx.connection.execute(insert(TABLE).values(values))


async def withdraw(tx: Transaction, user_id: int, *kinds: MailType) -> None:
    """Delete the account's queued emails of these types. Without `kinds`, delete all, including sent ones."""
    which = TABLE.c.user_id == user_id
    if kinds:
        which &= TABLE.c.kind.in_(kinds) & TABLE.c.due_at.is_not(None)
    await tx.connection.execute(delete(TABLE).where(which))


# --- sending


async def claim(database: Database, owner: str) -> ClaimedMail | None:
    """Lease the email that is due first and return it, with a new token if it needs one. Return None when none is due.

    Emails that must no longer be sent are deleted.
    """
    while True:
        due = select(TABLE.c.id).where(_is_due(is_sqlite=database.is_sqlite)).limit(1)
        # Check without a lock first: an idle worker must not take SQLite's write lock once a second.
        if not await database.select(due):
            return None
        is_done, mail = await database.write(lambda tx: _claim_one(tx, owner))
        if is_done:
            return mail


def _is_due(*, is_sqlite: bool) -> ColumnElement[bool]:
    return has_expired(TABLE.c.due_at, MAX_POSTPONED_SECONDS, is_sqlite=is_sqlite)


async def _claim_one(tx: Transaction, owner: str) -> tuple[bool, ClaimedMail | None]:
    """Lease the email that is due first, if any. Return whether the search is over, and the leased email."""
    now = now_in_seconds(is_sqlite=tx.is_sqlite)
    first = select(TABLE).where(_is_due(is_sqlite=tx.is_sqlite)).order_by(TABLE.c.due_at, TABLE.c.id).limit(1)
    mail = await one(tx.connection, first.with_for_update(skip_locked=True))
    if mail is None:
        return True, None
    if mail["attempts"] >= MAX_ATTEMPTS:
        log.error("email abandoned; result of the last attempt unknown", mail=mail["id"], kind=mail["kind"])
        await _write(tx, TABLE.c.id == mail["id"], {"due_at": None, "lease_owner": None, "failed_at": utc_now()})
        return False, None
    kind = MailType(mail["kind"])
    user = await _account_of(tx, mail)
    is_requested = mail["user_id"] is None
    if kind in PROVING and not is_requested and (other := await _other_owner(tx, mail)) is not None:
        kind, user, is_requested = MailType.ADDRESS_TAKEN, other, True
    is_sent = user is not None and _is_wanted(kind, user, mail)
    if user is None or not is_sent or (is_requested and not await _may_have(tx, user, kind)):
        await tx.connection.execute(delete(TABLE).where(TABLE.c.id == mail["id"]))
        return False, None
    # Use the account's own spelling: another spelling with the same key may be another person's mailbox.
    recipient = user["email"] if is_requested else mail["recipient"]
    purpose = PURPOSES.get(kind)
    token = await one_time_tokens.mint(tx, purpose, user["id"], recipient) if purpose is not None else None
    attempts = mail["attempts"] + 1
    values = {"user_id": user["id"], "kind": kind.value, "recipient": recipient}
    values |= {"attempts": attempts, "lease_owner": owner}
    await _write(tx, TABLE.c.id == mail["id"], {**values, "due_at": now + LEASE_SECONDS})
    return True, ClaimedMail(mail["id"], kind, recipient, user["username"], mail["created_at"], attempts, token)


async def _account_of(tx: Transaction, mail: Row) -> dict[str, Any] | None:
    """Lock and return the account's row. The lock makes the second of two requests for one account see the first."""
    table = models.users
    known = mail["user_id"] is not None
    which = table.c.id == mail["user_id"] if known else table.c.email_key == unique_key(mail["recipient"])
    return await one(tx.connection, select(table).where(which, users.exists()).with_for_update(key_share=True))


async def _other_owner(tx: Transaction, mail: Row) -> dict[str, Any] | None:
    """Lock and return the row of another account that has the recipient's address. Return None if there is none."""
    table = models.users
    which = (table.c.email_key == unique_key(mail["recipient"])) & (table.c.id != mail["user_id"])
    return await one(tx.connection, select(table).where(which, users.exists()).with_for_update(key_share=True))


def _is_wanted(kind: MailType, user: Row, mail: Row) -> bool:
    """Return whether the account must still receive this email."""
    is_current = mail["user_id"] is None or mail["recipient"] == user["email"]
    is_late = user["created_at"] < utc_text(datetime.now(UTC) - timedelta(days=DAYS_TO_ACTIVATE))
    if kind is MailType.ACTIVATE:
        return bool(user["awaits_activation"]) and is_current and not is_late
    if kind is MailType.ADDRESS_TAKEN:
        return bool(user["is_active"] or user["awaits_activation"])
    if kind is MailType.RESET_PASSWORD:
        # A reset URL proves the address, too, so it helps an owner who lost the activation email.
        return bool(user["is_active"] or (user["awaits_activation"] and not is_late)) and is_current
    return bool(user["is_active"])


async def _may_have(tx: Transaction, user: Row, kind: MailType) -> bool:
    """Return whether the limits for requested emails permit this one: a maximum per day, and pauses between them."""
    now = datetime.now(UTC)
    is_recent = (TABLE.c.kind == kind.value) & (TABLE.c.created_at > utc_text(now - DAY))
    recent = select(func.count(), func.max(TABLE.c.created_at)).where(TABLE.c.user_id == user["id"], is_recent)
    count, newest = (await tx.connection.execute(recent)).one()
    pause = timedelta(seconds=REQUEST_PAUSE_SECONDS)
    return count < MAX_REQUESTED_PER_DAY and (newest is None or newest < utc_text(now - pause))


async def sent(database: Database, mail: ClaimedMail, owner: str) -> None:
    """Mark an email as sent."""
    await _settle(database, mail, owner, {"due_at": None, "sent_at": utc_now()})


async def failed(database: Database, mail: ClaimedMail, owner: str) -> None:
    """Mark an email as failed; it is not sent again."""
    await _settle(database, mail, owner, {"due_at": None, "failed_at": utc_now()})


async def postpone(database: Database, mail: ClaimedMail, owner: str, seconds: float) -> None:
    """Make an email due again after `seconds`."""
    await _settle(database, mail, owner, {"due_at": now_in_seconds(is_sqlite=database.is_sqlite) + seconds})


async def release(database: Database, mail: ClaimedMail, owner: str) -> None:
    """Release an email whose attempt was interrupted, so that another worker can claim it immediately."""
    now = now_in_seconds(is_sqlite=database.is_sqlite)
    await _settle(database, mail, owner, {"due_at": now, "attempts": mail.attempts - 1})


async def _settle(database: Database, mail: ClaimedMail, owner: str, values: Row) -> None:
    """Write `values` and end the lease; do nothing if the email has been claimed again since this claim."""
    is_ours = (TABLE.c.id == mail.id) & (TABLE.c.lease_owner == owner) & (TABLE.c.attempts == mail.attempts)
    await database.write(lambda tx: _write(tx, is_ours, {**values, "lease_owner": None}))


async def _write(tx: Transaction, which: ColumnElement[bool], values: Row) -> None:
    await tx.connection.execute(update(TABLE).where(which).values(dict(values)))


# --- clean-up


async def forget(database: Database, now: datetime) -> int:
    """Delete emails that, at `now` (timezone-aware), were sent over a day or failed over a week ago.

    Return how many were deleted.
    """
    is_old = or_(TABLE.c.sent_at < utc_text(now - DAY), TABLE.c.failed_at < utc_text(now - KEPT_WHEN_FAILED))
    return await delete_without_events(database, TABLE, is_old)
