"""Invented users, who rate and discuss generated movies. They are no accounts: see decision 25.

Their rows are like those of deleted accounts, so no client sees them, and nobody can sign in as one of them. All jobs
share them, and they are stored when the first job needs them.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select

import models
from core.identity import Group
from core.times import utc_now
from repository.engine.statement import statement
from repository.engine.transaction import Transaction

# As many ratings as a movie can get from generation.
INVENTED_USERS = 100
# No password has this hash.
NO_PASSWORD = "invented"  # noqa: S105 (no password)
# No user name has such a key, because the keys of names are case-folded.
_KEYS = [f"INVENTED {number}" for number in range(INVENTED_USERS)]
_INSERT = statement(
    'INSERT INTO users (username_key, password_hash, "group", created_at, updated_at, deleted_at,'
    " is_active, awaits_activation, version) VALUES ($1, $2, $3, $4::text::timestamptz, $5::text::timestamptz,"
    " $6::text::timestamptz, FALSE, FALSE, 1) ON CONFLICT (username_key) DO NOTHING"
)


async def ids(tx: Transaction) -> Sequence[int]:
    """Return the ids of the invented users, always in the same order. Store those that are missing."""
    found = await _find(tx)
    if len(found) < INVENTED_USERS:
        now = utc_now()
        made = [(key, NO_PASSWORD, Group.USER.value, now, now, now) for key in _KEYS if key not in found]
        await tx.execute_many(_INSERT, made)
        found = await _find(tx)
    return [found[key] for key in _KEYS]


async def _find(tx: Transaction) -> dict[str, int]:
    users = models.users.c
    rows = await tx.connection.execute(select(users.username_key, users.id).where(users.username_key.in_(_KEYS)))
    return {row.username_key: row.id for row in rows}
