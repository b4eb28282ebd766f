"""Accounts as their owners and admins see them."""

from __future__ import annotations

from starlette.responses import Response

import account_schemas
from errors import Forbidden, Unauthenticated
from repository import users
from routes import queries, rendering
from routes.operation import LIST_HEADERS, Call, Operation
from security import Group


async def me(call: Call) -> Response:
    user = await users.find(call.database, call.me.user_id)
    if user is None:
        raise Unauthenticated("The access token is not valid or has expired")
    found = users.public(user)
    return rendering.JSONResponse(found, headers={"Cache-Control": "no-store"})


def require_admin(call: Call) -> None:
    if call.me.group is not Group.ADMIN:
        raise Forbidden("Only admins can do this")


async def list_non_admins(call: Call) -> Response:
    require_admin(call)
    found = await users.list_non_admins(call.database, offset=call.query.start, limit=call.query.limit)
    return rendering.page(call, found)


OPERATIONS = [
    Operation("GET", "/auth/me", me, "Who am I", "accounts", {200: account_schemas.User}, signed_in=True),
    Operation(
        "GET",
        "/users/nonAdmin",
        list_non_admins,
        "List the users that are not admins (admins only)",
        "accounts",
        {200: list[account_schemas.User]},
        query_model=queries.PageQuery,
        signed_in=True,
        errors=(403,),
        answer_headers=LIST_HEADERS,
    ),
]
