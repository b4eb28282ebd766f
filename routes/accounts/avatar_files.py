"""The files of pictures and the accounts that name them, kept together.

Files come first, then the account names them, then those that it named before go. A name that no account has any more
never comes back, so its files can be deleted at any time; what cannot be deleted now the clean-up finds.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog

from core.errors import Problem, Unavailable
from repository.accounts import avatars, users
from routes.http.operation import Call, Services
from routes.http.uploads import FILE_FIELD

RANDOM_NAME_LENGTH = 16  # bytes

log = structlog.get_logger("pictures")


@asynccontextmanager
async def stored(services: Services, content: bytes) -> AsyncIterator[str]:
    """The pictures made of `content`, in the storage under a new name, while an account is given them.

    When that is refused they are deleted. Raises InvalidInput, TooManyRequests and Unavailable.
    """
    made = await services.pictures.squares(content, avatars.SIDES)
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
        # The account may have got them before its answer was lost. If not, the clean-up finds them.
        raise
    except Problem:
        await discard(services, avatar)
        raise


@asynccontextmanager
async def brought(call: Call, user_id: int) -> AsyncIterator[dict[str, str]]:
    """The column that the file of a form sets, if it brought one, while an account is given it with the rest."""
    content = getattr(call.body, FILE_FIELD, None)
    if not isinstance(content, bytes):
        yield {}
        return
    former = await _current(call, user_id)
    async with stored(call.services, content) as avatar:
        yield {"avatar": avatar}
    # An answer that was repeated by its Idempotency-Key, too, has left the account as it was.
    current = await _current(call, user_id)
    for each in {former, avatar} - {current}:
        await discard(call.services, each)


async def _current(call: Call, user_id: int) -> str | None:
    user = await users.find(call.database, user_id)
    return user["avatar"] if user is not None else None


async def discard(services: Services, avatar: str | None) -> None:
    """Delete the files of an avatar that no account has any more."""
    if avatar is None:
        return
    try:
        await services.storage.delete([avatars.file_name(avatar, side) for side in avatars.SIDES])
    except Unavailable:
        log.info("files are left for the clean-up", avatar=avatar)
