"""Keep the files of avatars consistent with the accounts that refer to them.

New files are stored first. Then the account is updated to refer to them, and then its former files are deleted. An
avatar's name is never reused, so its files can be deleted at any time once no account refers to them. Files that could
not be deleted are deleted later by the clean-up.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog

from core.errors import Problem, Unavailable
from repository.accounts import avatars, users
from routes.http.operation import AnyCall, Services
from routes.http.uploads import FILE_FIELD
from services.limits.in_progress import Uploader

RANDOM_NAME_LENGTH = 16  # bytes

log = structlog.get_logger("pictures")


@asynccontextmanager
async def stored(call: AnyCall, content: bytes) -> AsyncIterator[str]:
    """Store the pictures made from `content` and yield their new name.

    The caller writes the name to an account inside the `with` block. If that write is rejected, the files are deleted.
    Raises InvalidInput, TooManyRequests or Unavailable.
    """
    services = call.services
    made = await services.pictures.squares(content, avatars.SIDES, Uploader(call.me.user_id, call.address))
    avatar = secrets.token_hex(RANDOM_NAME_LENGTH)
    names = [avatars.file_name(avatar, side) for side in avatars.SIDES]
    puts = (services.storage.put(name, picture) for name, picture in zip(names, made, strict=True))
    failed = [each for each in await asyncio.gather(*puts, return_exceptions=True) if each is not None]
    if failed:
        await discard(services, avatar)
        raise failed[0]
    try:
        yield avatar
    except Unavailable:
        # The write may have succeeded although the database's response was lost, so the files must stay. If the write
        # failed, the clean-up deletes them.
        raise
    except Problem:
        await discard(services, avatar)
        raise


@asynccontextmanager
async def uploaded(call: AnyCall, user_id: int) -> AsyncIterator[dict[str, str]]:
    """Store the file of a form, and yield the column and value to set, or an empty dict if the form has no file.

    The caller updates the account inside the `with` block. Afterwards, the former and the new files are deleted unless
    the account refers to them.
    """
    content = getattr(call.body, FILE_FIELD, None)
    if not isinstance(content, bytes):
        yield {}
        return
    former = await _current(call, user_id)
    async with stored(call, content) as avatar:
        yield {"avatar": avatar}
    # A request that repeats an earlier Idempotency-Key changes nothing, so the account may still use the former files.
    current = await _current(call, user_id)
    for each in {former, avatar} - {current}:
        await discard(call.services, each)


async def _current(call: AnyCall, user_id: int) -> str | None:
    user = await users.find(call.database, user_id)
    return user["avatar"] if user is not None else None


async def discard(services: Services, avatar: str | None) -> None:
    """Delete the files of an avatar that no account uses."""
    if avatar is None:
        return
    try:
        await services.storage.delete([avatars.file_name(avatar, side) for side in avatars.SIDES])
    except Unavailable:
        log.info("avatar files left for a later clean-up", avatar=avatar)
