"""The check of rights in a write: the session must be open, the account active, and its group no lower than before.

A request is authenticated before its body is read and its transaction begins. The check in the transaction, under the
lock on the head of the log, finds what has changed since then. Every transaction that takes rights away emits an event,
and so takes the same lock. Therefore no event of a request comes after the event that took its writer's rights away.
"""

from __future__ import annotations

import time
from typing import Any

from core.errors import Forbidden, invalid_token
from core.identity import CLOCK_LEEWAY_SECONDS, Group, Identity
from repository.engine.statement import statement
from repository.engine.transaction import Transaction

# Every request with a token runs this statement, so it reads the account and the session together.
ACCOUNT_OF_SESSION = statement(
    'SELECT users."group", users.is_active, users.username FROM sessions JOIN users ON users.id = sessions.user_id'
    " WHERE sessions.id = $1 AND sessions.user_id = $2 AND sessions.ended_at IS NULL"
)
# The end of an INSERT … SELECT that stores a row only if the writer still has its rights.
WHILE_RIGHTS_HOLD = (
    " FROM sessions JOIN users ON users.id = sessions.user_id WHERE sessions.id = $11 AND sessions.user_id = $12"
    ' AND sessions.ended_at IS NULL AND users.is_active AND users."group" = $13'
)


def is_expired(identity: Identity) -> bool:
    """Return whether the access token has expired, with the usual leeway for clocks."""
    return identity.expires_at + CLOCK_LEEWAY_SECONDS <= time.time()


async def require(tx: Transaction, writer: Identity) -> None:
    """Raise Unauthenticated or Forbidden unless the writer has at least the rights that it was authenticated with."""
    driver = await tx.driver()
    values = writer.session_id, writer.user_id
    if tx.is_sqlite:
        found: Any = await driver.execute_fetchall(ACCOUNT_OF_SESSION.sqlite, values)
    else:
        found = await driver.fetch(ACCOUNT_OF_SESSION.postgresql, *values)
    ((group, is_active, _),) = found or ((Group.USER, False, None),)
    if not is_active or is_expired(writer):
        raise invalid_token("access")
    if Group(group).rank < writer.group.rank:
        raise Forbidden("Your group has changed since this request began. Nothing was written; send the request again")


async def spend(tx: Transaction) -> None:
    """Check the writer's rights now instead of at the end, because the transaction itself will take them away."""
    if tx.writer is not None:
        await require(tx, tx.writer)
        tx.writer = None
