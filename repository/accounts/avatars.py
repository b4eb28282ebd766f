"""The pictures of accounts: which ones they are. The files themselves are in the storage, under names that say whose
nothing, so that who has not been shown one cannot guess it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

import models
from repository.accounts import edits, users
from repository.accounts.edits import Editor
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic.versions import IfMatch

FOLDER = "avatars"
SIDES = (users.AVATAR_PIXELS, users.THUMBNAIL_PIXELS)
_FILE = re.compile(rf"^{FOLDER}/([0-9a-f]{{32}})/[0-9]+\.webp$")


def file_name(avatar: str, side: int | str) -> str:
    return f"{FOLDER}/{avatar}/{side}.webp"


def avatar_of(name: str) -> str | None:
    """The avatar that a file of the storage belongs to; None for a file that is not ours."""
    match = _FILE.match(name)
    return match[1] if match is not None else None


@dataclass(frozen=True, slots=True)
class Changed:
    """The account as it is now, as `users.public`, and the avatar whose files nobody needs any more."""

    user: dict[str, Any]
    former: str | None


async def change(tx: Transaction, editor: Editor, user_id: int, avatar: str | None, if_match: IfMatch) -> Changed:
    """Put another picture, or none, in the place of the account's, whether there is a profile or not.

    Raises Forbidden, NotFound and PreconditionFailed.
    """
    before = await edits.locked_for(tx, editor, user_id, if_match)
    after = await users.change(tx, before, {"avatar": avatar}, actor_id=editor.user_id)
    await edits.record(tx, "avatar", before, after, editor)
    return Changed(users.public(after), before["avatar"] if before["avatar"] != avatar else None)


async def named(database: Database, avatars: Iterable[str]) -> set[str]:
    """Those of `avatars` that an account has."""
    column = models.users.c.avatar
    async with database.read() as connection:
        found = await connection.execute(select(column).where(column.in_(sorted(set(avatars)))))
        return set(found.scalars())
