"""Avatars: uploading, removing and serving the pictures of accounts."""

from __future__ import annotations

from typing import Annotated, Literal

import orjson
from pydantic import Field
from starlette.responses import Response

from core.errors import NotAcceptable, NotFound
from repository.accounts import avatars
from resources.accounts.credentials import User
from resources.accounts.profiles import AvatarForm
from routes.accounts import avatar_files
from routes.accounts.access import account_id, as_editor
from routes.http import queries, rendering
from routes.http.operation import Call, Details, Operations
from routes.http.queries import ById
from services.pictures import images

HEADERS = {
    # A URL always shows the same picture; a new picture gets a new URL.
    "Cache-Control": "public, max-age=31536000, immutable",
    # Browsers must never render a picture as a page, even if the decoder has accepted other content.
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Content-Disposition": "inline",
    "Cross-Origin-Resource-Policy": "cross-origin",  # allows pages of other origins to show the picture
}
UPLOAD = Details(
    description="Send the picture as the field `avatar` of a form, or as the body itself. The picture is turned "
    "upright, and only its centre square is kept, as WebP of at most 512 × 512 and 128 × 128 pixels, without any "
    "metadata.",
    form=AvatarForm,
    signed_in=True,
    if_match=True,
)

operations = Operations("accounts")


@operations.put("/users/me/avatar", "Upload my picture", {200: User}, UPLOAD)
@operations.put(
    "/users/{id}/avatar", "Upload a user's picture (owner and admins only)", {200: User}, UPLOAD, errors=(403, 404)
)
async def put(call: Call[ById | None, None, AvatarForm]) -> Response:
    user_id = account_id(call)
    editor = as_editor(call, user_id)
    versions = rendering.if_match(call)
    async with avatar_files.stored(call, call.body.avatar) as avatar:
        done = await call.write(lambda tx: avatars.change(tx, editor, user_id, avatar, versions))
    await avatar_files.discard(call.services, done.former)
    return rendering.tagged(done.user["version"], orjson.dumps(done.user))


@operations.delete("/users/me/avatar", "Remove my picture", signed_in=True, if_match=True)
@operations.delete(
    "/users/{id}/avatar",
    "Remove a user's picture (owner and admins only)",
    signed_in=True,
    if_match=True,
    errors=(403, 404),
)
async def delete(call: Call[ById | None, None, None]) -> Response:
    user_id = account_id(call)
    editor = as_editor(call, user_id)
    versions = rendering.if_match(call)
    done = await call.write(lambda tx: avatars.change(tx, editor, user_id, None, versions))
    await avatar_files.discard(call.services, done.former)
    return Response(status_code=204)


class ByAvatar(queries.Parameters):
    avatar: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    side: Literal["512", "128"]


@operations.get(
    "/avatars/{avatar}/{side}",
    "Get a picture",
    {200: bytes},
    description="An account's `avatar_url` and `avatar_thumbnail_url` point here. A URL always shows the same picture; "
    "a new picture gets a new URL.",
    errors=(404, 406),
    media_type=images.MEDIA_TYPE,
    if_none_match=True,
    uncompressed=True,
)
async def show(call: Call[ByAvatar, None, None]) -> Response:
    if call.is_socket:
        raise NotAcceptable("A websocket carries only JSON and text: request the picture over HTTP")
    avatar, side = call.path.avatar, call.path.side
    picture = await call.services.storage.get(avatars.file_name(avatar, side))
    if picture is None:
        raise NotFound(f"There is no picture {avatar}")
    return rendering.immutable(call, picture, images.MEDIA_TYPE, HEADERS)
