"""Profiles: the personal data of accounts, visible to the owner and to admins.

Every handler serves both `/users/me/profile` and `/users/{id}/profile`.
"""

from __future__ import annotations

import orjson
from starlette.responses import Response

from repository.accounts import edits
from repository.engine.transaction import Transaction
from repository.generic.idempotency import StoredResponse
from resources.accounts.profiles import (
    Profile,
    ProfileBody,
    ProfileChange,
    ProfileForm,
    ProfilePatch,
    ProfilePatchForm,
    ProfileReplacement,
    dumped,
)
from routes.accounts import avatar_files
from routes.accounts.access import account, account_id, as_editor
from routes.http import rendering
from routes.http.operation import Call, Details, Operations
from routes.http.queries import ById

GET = Details(signed_in=True, if_none_match=True)
CREATE = Details(
    description="An account has at most one profile. A new profile already contains the names given at registration.",
    form=ProfileForm,
    signed_in=True,
    idempotent=True,
    answer_headers=("Location", "ETag"),
)
REPLACE = Details(body=ProfileReplacement, form=ProfileForm, signed_in=True, if_match=True, answer_headers=("ETag",))
PATCH = Details(body=ProfileChange, form=ProfilePatchForm, signed_in=True, if_match=True, answer_headers=("ETag",))

operations = Operations("accounts")


@operations.get("/users/me/profile", "Get my profile", {200: Profile}, GET, errors=(404,))
@operations.get(
    "/users/{id}/profile", "Get a user's profile (owner and admins only)", {200: Profile}, GET, errors=(403, 404)
)
async def get(call: Call[ById | None, None, None]) -> Response:
    user_id = account_id(call)
    as_editor(call, user_id)
    user = await account(call.database, user_id)
    edits.require_profile(user)
    return rendering.entity(call, user["version"], orjson.dumps(edits.public_profile(user)))


@operations.post("/users/me/profile", "Create my profile", {201: Profile}, CREATE, errors=(409,))
@operations.post(
    "/users/{id}/profile",
    "Create a user's profile (owner and admins only)",
    {201: Profile},
    CREATE,
    errors=(403, 404, 409),
)
async def create(call: Call[ById | None, None, ProfileBody]) -> Response:
    user_id = account_id(call)
    editor = as_editor(call, user_id)
    fields = call.body.model_dump(exclude_unset=True, exclude={"avatar"})

    async def work(tx: Transaction) -> StoredResponse:
        after = await edits.create_profile(tx, editor, user_id, {**fields, **avatar})
        body = orjson.dumps(edits.public_profile(after))
        location = f"{call.prefix}/users/{user_id}/profile"
        return StoredResponse(201, body, {"Location": location, "ETag": rendering.tag(after["version"], body)})

    async with avatar_files.uploaded(call, user_id) as avatar:
        return await rendering.write_once(call, work)


@operations.put("/users/me/profile", "Replace my profile", {200: Profile}, REPLACE, errors=(404, 409))
@operations.put(
    "/users/{id}/profile",
    "Replace a user's profile (owner and admins only)",
    {200: Profile},
    REPLACE,
    errors=(403, 404, 409),
)
@operations.patch("/users/me/profile", "Change my profile", {200: Profile}, PATCH, errors=(404, 409))
@operations.patch(
    "/users/{id}/profile",
    "Change a user's profile (owner and admins only)",
    {200: Profile},
    PATCH,
    errors=(403, 404, 409),
)
async def edit(call: Call[ById | None, None, ProfileBody | ProfilePatch]) -> Response:
    user_id = account_id(call)
    editor = as_editor(call, user_id)
    fields = dumped(call.body)
    versions = rendering.if_match(call)
    async with avatar_files.uploaded(call, user_id) as avatar:
        after = await call.write(lambda tx: edits.edit_profile(tx, editor, user_id, {**fields, **avatar}, versions))
    return rendering.tagged(after["version"], orjson.dumps(edits.public_profile(after)))
