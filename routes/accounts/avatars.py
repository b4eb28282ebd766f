"""Pictures of people: given, taken away, and shown."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from starlette.responses import Response

from core.errors import NotAcceptable, NotFound
from repository.accounts import avatars
from repository.accounts.avatars import AvatarChange
from repository.accounts.edits import Editor
from repository.engine.transaction import Transaction
from resources.accounts import credentials, profiles
from routes.accounts import avatar_files
from routes.accounts.users import edited, editor
from routes.http import queries, rendering
from routes.http.operation import Call, Operation
from services.pictures import images

HEADERS = {
    # The name is that of one picture for ever; another picture has another one.
    "Cache-Control": "public, max-age=31536000, immutable",
    # Never taken for a page, whatever somebody may have smuggled through the decoder.
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Content-Disposition": "inline",
    "Cross-Origin-Resource-Policy": "cross-origin",  # pages of other origins show it, too
}


class ByAvatar(queries.Query):
    avatar: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    side: Literal["512", "128"]


async def _change(call: Call, who: Editor, user_id: int, avatar: str | None) -> AvatarChange:
    versions = rendering.if_match(call)

    async def work(tx: Transaction) -> AvatarChange:
        return await avatars.change(tx, who, user_id, avatar, versions)

    return await call.database.write(work)


async def _put(call: Call, user_id: int) -> Response:
    who = editor(call, user_id)
    async with avatar_files.stored(call.services, call.body.avatar) as avatar:
        done = await _change(call, who, user_id, avatar)
    await avatar_files.discard(call.services, done.former)
    return edited(done.user["version"], done.user)


async def _delete(call: Call, user_id: int) -> Response:
    done = await _change(call, editor(call, user_id), user_id, None)
    await avatar_files.discard(call.services, done.former)
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
    return rendering.immutable(call, picture, images.MEDIA_TYPE, HEADERS)


def _operation(method: str, path: str, handler: Any, summary: str, **more: Any) -> Operation:
    success: dict[int, Any] = {200: credentials.User} if method == "PUT" else {204: None}
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
_FORM = TypeAdapter(profiles.AvatarForm)
OPERATIONS = [
    _operation(
        "PUT",
        "/users/me/avatar",
        put_mine,
        "Give myself a picture",
        description=_GIVEN,
        form=_FORM,
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
        media_type=images.MEDIA_TYPE,
        if_none_match=True,
        answer_headers=("ETag",),
    ),
]
