"""Pictures of people: given, taken away, and shown."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import orjson
import structlog
from pydantic import ConfigDict, Field, TypeAdapter
from starlette.responses import Response

import account_schemas
import pictures
from errors import Forbidden, NotAcceptable, NotFound, Problem, Unavailable
from repository import avatars
from repository.account_edits import Editor
from repository.avatars import Changed
from repository.transaction import Transaction
from routes import queries, rendering
from routes.limit_groups import LimitGroup
from routes.operation import Call, Operation, Services
from schemas import Body
from security import Group

RANDOM_NAME_LENGTH = 16  # bytes
HEADERS = {
    # The name is that of one picture for ever; another picture has another one.
    "Cache-Control": "public, max-age=31536000, immutable",
    # Never taken for a page, whatever somebody may have smuggled through the decoder.
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Content-Disposition": "inline",
    "Cross-Origin-Resource-Policy": "cross-origin",  # pages of other origins show it, too
}

log = structlog.get_logger("avatars")

Picture = Annotated[
    bytes, Field(description="JPEG, PNG or WebP", json_schema_extra={"type": "string", "format": "binary"})
]


class AvatarForm(Body):
    """A picture; of what it is, only the bytes count."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"avatar": "(the bytes of a picture)"}]})

    avatar: Picture


class ByAvatar(queries.Query):
    avatar: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    side: Literal["512", "128"]


# --- storing


@asynccontextmanager
async def stored(services: Services, content: bytes) -> AsyncIterator[str]:
    """The pictures made of `content`, in the storage under a new name, while an account is given them.

    When that is refused they are deleted. Raises InvalidInput, TooManyRequests and Unavailable.
    """
    made = await services.pictures.squares(content, avatars.SIDES)
    avatar = secrets.token_hex(RANDOM_NAME_LENGTH)
    try:
        async with asyncio.TaskGroup() as tasks:
            for side, picture in zip(avatars.SIDES, made, strict=True):
                tasks.create_task(services.storage.put(avatars.file_name(avatar, side), picture))
    except* Unavailable as group:
        await discard(services, avatar)
        raise group.exceptions[0] from group
    try:
        yield avatar
    except Unavailable:
        # The account may have got them before its answer was lost. If not, the clean-up finds them.
        raise
    except Problem:
        await discard(services, avatar)
        raise


async def discard(services: Services, avatar: str | None) -> None:
    """Delete the files of an avatar that no account has any more. What cannot be deleted now the clean-up finds."""
    if avatar is None:
        return
    try:
        await services.storage.delete([avatars.file_name(avatar, side) for side in avatars.SIDES])
    except Unavailable:
        log.info("files are left for the clean-up", avatar=avatar)


# --- handlers


def require_own(call: Call, user_id: int) -> None:
    """Raises Forbidden."""
    if call.me.user_id != user_id and call.me.group is not Group.ADMIN:
        raise Forbidden("Only the user and admins can do this")


async def _change(call: Call, user_id: int, avatar: str | None) -> Changed:
    versions = rendering.if_match(call)
    editor = Editor(call.me.user_id, call.address, is_admin=call.me.user_id != user_id)

    async def work(tx: Transaction) -> Changed:
        return await avatars.change(tx, editor, user_id, avatar, versions)

    return await call.database.write(work)


async def _put(call: Call, user_id: int) -> Response:
    require_own(call, user_id)
    async with stored(call.services, call.body.avatar) as avatar:
        done = await _change(call, user_id, avatar)
    await discard(call.services, done.former)
    body = orjson.dumps(done.user)
    headers = {"ETag": rendering.tag(done.user["version"], body), "Cache-Control": "no-store"}
    return Response(body, 200, headers, "application/json")


async def _delete(call: Call, user_id: int) -> Response:
    require_own(call, user_id)
    done = await _change(call, user_id, None)
    await discard(call.services, done.former)
    return Response(status_code=204)


async def put(call: Call) -> Response:
    return await _put(call, call.path.id)


async def put_mine(call: Call) -> Response:
    return await _put(call, call.me.user_id)


async def delete(call: Call) -> Response:
    return await _delete(call, call.path.id)


async def delete_mine(call: Call) -> Response:
    return await _delete(call, call.me.user_id)


async def show(call: Call) -> Response:
    if call.is_socket:
        raise NotAcceptable("A socket carries JSON and texts only: ask for the picture over HTTP")
    avatar, side = call.path.avatar, call.path.side
    picture = await call.services.storage.get(avatars.file_name(avatar, side))
    if picture is None:
        raise NotFound(f"There is no picture {avatar}")
    return rendering.immutable(call, picture, pictures.MEDIA_TYPE, HEADERS)


def _operation(method: str, path: str, handler: Any, summary: str, **more: Any) -> Operation:
    success: dict[int, Any] = {200: account_schemas.User} if method == "PUT" else {204: None}
    path_model = queries.ById if "{id}" in path else None
    return Operation(
        method,
        path,
        handler,
        summary,
        "accounts",
        success,
        path_model=path_model,
        signed_in=True,
        if_match=True,
        **more,
    )


_GIVEN = (
    "The picture is the field `avatar` of a form, or the body itself. The middle of it is kept, upright, as WebP of at "
    "most 512 × 512 and 128 × 128 pixels, and nothing else of the file."
)
_FORM = TypeAdapter(AvatarForm)
OPERATIONS = [
    _operation(
        "PUT",
        "/users/me/avatar",
        put_mine,
        "Give myself a picture",
        description=_GIVEN,
        form=_FORM,
        limit_group=LimitGroup.UPLOAD,
        errors=(412, 429),
    ),
    _operation("DELETE", "/users/me/avatar", delete_mine, "Take my picture away", errors=(412,)),
    _operation(
        "PUT",
        "/users/{id}/avatar",
        put,
        "Give a user a picture",
        description=_GIVEN,
        form=_FORM,
        limit_group=LimitGroup.UPLOAD,
        errors=(403, 404, 412, 429),
    ),
    _operation("DELETE", "/users/{id}/avatar", delete, "Take a user's picture away", errors=(403, 404, 412)),
    Operation(
        "GET",
        "/avatars/{avatar}/{side}",
        show,
        "Get a picture",
        "accounts",
        {200: bytes},
        description="What `avatar_url` and `avatar_thumbnail_url` of accounts lead to. A picture never changes: "
        "another one has another address.",
        path_model=ByAvatar,
        errors=(404, 406),
        media_type=pictures.MEDIA_TYPE,
        if_none_match=True,
        answer_headers=("ETag",),
    ),
]
