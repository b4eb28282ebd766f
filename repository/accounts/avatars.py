"""Stores which picture is the avatar of an account.

The files are in the file storage, under random names that do not reveal their owner and cannot be guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

import models
from repository.accounts import edits, users
from repository.accounts.audit import Editor
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic.versions import IfMatch

FOLDER = "avatars"
SIDES = (users.AVATAR_PIXELS, users.THUMBNAIL_PIXELS)
_FILE = re.compile(rf"^{FOLDER}/([0-9a-f]{{32}})/[0-9]+\.webp$")


def file_name(avatar: str, side: int | str) -> str:
    """Return the name of the file that holds the avatar at `side` × `side` pixels."""
    return f"{FOLDER}/{avatar}/{side}.webp"


def avatar_of(name: str) -> str | None:
    """Return the avatar that a stored file belongs to, or None for a file that is not an avatar's."""
    match = _FILE.match(name)
    return match[1] if match is not None else None


@dataclass(frozen=True, slots=True)
class AvatarChange:
    """The account after the change, in its `public` form, and its former avatar, whose files can be deleted."""

    user: dict[str, Any]
    former: str | None


async def change(tx: Transaction, editor: Editor, user_id: int, avatar: str | None, if_match: IfMatch) -> AvatarChange:
    """Replace or remove the avatar of an account. Raises Forbidden, NotFound or PreconditionFailed."""
    before = await edits.lock_for(tx, editor, user_id, if_match)
    after = await edits.change(tx, editor, "avatar", before, {"avatar": avatar})
    return AvatarChange(users.public(after), before["avatar"] if before["avatar"] != avatar else None)


async def named(database: Database, avatars: Iterable[str]) -> set[str]:
    """Return the subset of `avatars` that accounts use."""
    column = models.users.c.avatar
    found = await database.select(select(column).where(column.in_(sorted(set(avatars)))))
    return {row.avatar for row in found}
