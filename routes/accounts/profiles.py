"""Profiles: what an account says of its owner, for the owner and for admins.

Every handler once, for `/users/me/profile` and `/users/{id}/profile`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import orjson
from pydantic import TypeAdapter
from starlette.responses import Response

from repository.accounts import edits, users
from repository.engine.transaction import Transaction
from repository.generic import idempotency
from repository.generic.idempotency import StoredResponse
from resources.accounts import profiles
from routes.accounts import avatar_files
from routes.accounts.users import edited, editor
from routes.http import queries, rendering
from routes.http.operation import Call, Operation


def _whose(call: Call, *, is_mine: bool) -> int:
    user_id: int = call.me.user_id if is_mine else call.path.id
    return user_id


async def get(is_mine: bool, call: Call) -> Response:
    user_id = _whose(call, is_mine=is_mine)
    editor(call, user_id)
    user = await users.find(call.database, user_id)
    if user is None:
        raise users.not_found(user_id)
    edits.require_profile(user)
    return rendering.entity(call, user["version"], orjson.dumps(edits.public_profile(user)))


async def create(is_mine: bool, call: Call) -> Response:
    user_id = _whose(call, is_mine=is_mine)
    who = editor(call, user_id)
    fields = call.body.model_dump(exclude_unset=True, exclude={"avatar"})
    key = rendering.claim(call)

    async def work(tx: Transaction) -> StoredResponse:
        async def add() -> StoredResponse:
            after = await edits.create_profile(tx, who, user_id, {**fields, **brought})
            body = orjson.dumps(edits.public_profile(after))
            location = f"{call.prefix}/users/{user_id}/profile"
            return StoredResponse(201, body, {"Location": location, "ETag": rendering.tag(after["version"], body)})

        return await idempotency.once(tx, key, add)

    async with avatar_files.brought(call, user_id) as brought:
        answer = await call.database.write(work)
    return rendering.answer(answer)


async def edit(is_mine: bool, call: Call) -> Response:
    user_id = _whose(call, is_mine=is_mine)
    who = editor(call, user_id)
    fields = profiles.dumped(call.body)
    versions = rendering.if_match(call)

    async def work(tx: Transaction) -> dict[str, Any]:
        return await edits.edit_profile(tx, who, user_id, {**fields, **brought}, versions)

    async with avatar_files.brought(call, user_id) as brought:
        after = await call.database.write(work)
    return edited(after["version"], edits.public_profile(after))


def _operations(path: str, whose: str, *, is_mine: bool) -> list[Operation]:
    path_model = None if is_mine else queries.ById
    forbidden = () if is_mine else (403,)
    note = "" if is_mine else " (its owner and admins)"

    def of(method: str, handler: Any, summary: str, status: int, **more: Any) -> Operation:
        return Operation(
            method,
            path,
            partial(handler, is_mine),
            f"{summary} {whose} profile{note}",
            "accounts",
            {status: profiles.Profile},
            path_model=path_model,
            signed_in=True,
            **more,
        )

    return [
        of("GET", get, "Get", 200, if_none_match=True, errors=(*forbidden, 404), answer_headers=("ETag",)),
        of(
            "POST",
            create,
            "Create",
            201,
            description="Once. The names may be there already, from registering.",
            body=TypeAdapter(profiles.ProfileBody),
            form=TypeAdapter(profiles.ProfileForm),
            idempotent=True,
            errors=(*forbidden, *(() if is_mine else (404,)), 409, 429),
            answer_headers=("Location", "ETag"),
        ),
        of(
            "PUT",
            edit,
            "Replace",
            200,
            body=TypeAdapter(profiles.ProfileBody),
            form=TypeAdapter(profiles.ProfileForm),
            if_match=True,
            errors=(*forbidden, 404, 412, 429),
            answer_headers=("ETag",),
        ),
        of(
            "PATCH",
            edit,
            "Change",
            200,
            body=TypeAdapter(profiles.ProfilePatch),
            form=TypeAdapter(profiles.ProfilePatchForm),
            if_match=True,
            errors=(*forbidden, 404, 412, 429),
            answer_headers=("ETag",),
        ),
    ]


OPERATIONS = [
    *_operations("/users/me/profile", "my", is_mine=True),
    *_operations("/users/{id}/profile", "a user's", is_mine=False),
]
