"""What admins do to accounts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import TypeAdapter
from starlette.responses import Response

import account_schemas
from repository import users
from repository.transaction import Transaction
from routes import queries, rendering
from routes.operation import Call, Operation
from routes.users import require_admin
from security import Group


async def _administer(call: Call, work: Callable[[Transaction], Awaitable[dict[str, Any]]]) -> Response:
    require_admin(call)
    return rendering.JSONResponse(await call.database.write(work))


async def change_group(call: Call) -> Response:
    group = Group(call.body.group)
    return await _administer(call, lambda tx: users.change_group(tx, call.me.user_id, call.path.id, group))


async def activate(call: Call) -> Response:
    return await _administer(call, lambda tx: users.activate(tx, call.me.user_id, call.path.id))


async def deactivate(call: Call) -> Response:
    return await _administer(call, lambda tx: users.deactivate(tx, call.me.user_id, call.path.id))


OPERATIONS = [
    Operation(
        "POST",
        "/admin/users/{id}/change-group",
        change_group,
        "Put a user into another group (admins only)",
        "accounts",
        {200: account_schemas.User},
        description="The last admin stays one.",
        path_model=queries.ById,
        body=TypeAdapter(account_schemas.GroupBody),
        signed_in=True,
        errors=(403, 404, 409),
    ),
    Operation(
        "POST",
        "/admin/users/{id}/activate",
        activate,
        "Let a user sign in again (admins only)",
        "accounts",
        {200: account_schemas.User},
        path_model=queries.ById,
        signed_in=True,
        errors=(403, 404),
    ),
    Operation(
        "POST",
        "/admin/users/{id}/deactivate",
        deactivate,
        "Shut a user out (admins only)",
        "accounts",
        {200: account_schemas.User},
        description="All sessions of the user end, and nobody signs in to the account before it is activated.",
        path_model=queries.ById,
        signed_in=True,
        errors=(403, 404, 409),
    ),
]
