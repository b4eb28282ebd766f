"""Profiles: what an account says of its owner, for the owner and for admins.

Every handler once, for `/users/me/profile` and `/users/{id}/profile`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import orjson
from pydantic import TypeAdapter
from starlette.responses import Response

import profile_schemas
from errors import NotFound
from repository import account_edits, idempotency, users
from repository.idempotency import Answer
from repository.transaction import Transaction
from routes import picture_files, queries, rendering
from routes.operation import Call, Operation
from routes.users import edited, editor


def _whose(call: Call, *, is_mine: bool) -> int:
    user_id: int = call.me.user_id if is_mine else call.path.id
    return user_id


async def get(is_mine: bool, call: Call) -> Response:
    user_id = _whose(call, is_mine=is_mine)
    editor(call, user_id)
    user = await users.find(call.database, user_id)
    if user is None:
        raise NotFound(f"There is no user {user_id}")
    account_edits.require_profile(user)
    return rendering.entity(call, user["version"], orjson.dumps(account_edits.public_profile(user)))


async def create(is_mine: bool, call: Call) -> Response:
    user_id = _whose(call, is_mine=is_mine)
    who = editor(call, user_id)
    fields = call.body.model_dump(exclude_unset=True, exclude={"avatar"})
    key = rendering.claim(call)

    async def work(tx: Transaction) -> Answer:
        async def add() -> Answer:
            after = await account_edits.create_profile(tx, who, user_id, {**fields, **brought})
            body = orjson.dumps(account_edits.public_profile(after))
            location = f"{call.prefix}/users/{user_id}/profile"
            return Answer(201, body, {"Location": location, "ETag": rendering.tag(after["version"], body)})

        return await idempotency.once(tx, key, add)

    async with picture_files.brought(call, user_id) as brought:
        answer = await call.database.write(work)
    return rendering.answer(answer)


async def edit(is_mine: bool, call: Call) -> Response:
    user_id = _whose(call, is_mine=is_mine)
    who = editor(call, user_id)
    fields = profile_schemas.dumped(call.body)
    versions = rendering.if_match(call)

    async def work(tx: Transaction) -> dict[str, Any]:
        return await account_edits.edit_profile(tx, who, user_id, {**fields, **brought}, versions)

    async with picture_files.brought(call, user_id) as brought:
        after = await call.database.write(work)
    return edited(after["version"], account_edits.public_profile(after))


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
            {status: profile_schemas.Profile},
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
            body=TypeAdapter(profile_schemas.ProfileBody),
            form=TypeAdapter(profile_schemas.ProfileForm),
            idempotent=True,
            errors=(*forbidden, *(() if is_mine else (404,)), 409, 429),
            answer_headers=("Location", "ETag"),
        ),
        of(
            "PUT",
            edit,
            "Replace",
            200,
            body=TypeAdapter(profile_schemas.ProfileBody),
            form=TypeAdapter(profile_schemas.ProfileForm),
            if_match=True,
            errors=(*forbidden, 404, 412, 429),
            answer_headers=("ETag",),
        ),
        of(
            "PATCH",
            edit,
            "Change",
            200,
            body=TypeAdapter(profile_schemas.ProfilePatch),
            form=TypeAdapter(profile_schemas.ProfilePatchForm),
            if_match=True,
            errors=(*forbidden, 404, 412, 429),
            answer_headers=("ETag",),
        ),
    ]


OPERATIONS = [
    *_operations("/users/me/profile", "my", is_mine=True),
    *_operations("/users/{id}/profile", "a user's", is_mine=False),
]
