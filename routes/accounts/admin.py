"""What admins do to accounts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import TypeAdapter
from starlette.responses import Response

from core.identity import Group
from repository.accounts import audit, edits, users
from repository.accounts.edits import Editor
from repository.engine.transaction import Transaction
from repository.generic.lists import ListRequest
from resources.accounts import credentials, profiles
from resources.accounts.fields import AUDIT_FIELDS
from routes.accounts import registration
from routes.accounts.users import edited, require_admin
from routes.http import queries, rendering
from routes.http.operation import LIST_HEADERS, Call, Operation


async def _administer(call: Call, work: Callable[[Transaction], Awaitable[dict[str, Any]]]) -> Response:
    require_admin(call)
    found = await call.database.write(work)
    return edited(found["version"], found)


async def change_group(call: Call) -> Response:
    group = Group(call.body.group)
    return await _administer(
        call, lambda tx: users.change_group(tx, call.me.user_id, call.path.id, group, address=call.address)
    )


async def activate(call: Call) -> Response:
    return await _administer(call, lambda tx: users.activate(tx, call.me.user_id, call.path.id, address=call.address))


async def deactivate(call: Call) -> Response:
    return await _administer(call, lambda tx: users.deactivate(tx, call.me.user_id, call.path.id, address=call.address))


async def create(call: Call) -> Response:
    require_admin(call)
    fields = profiles.dumped(call.body)
    group = Group(call.body.group)
    password_hash = await call.services.passwords.hash(call.body.password)
    who = Editor(call.me.user_id, call.address, is_admin=True)

    async def work(tx: Transaction) -> dict[str, Any]:
        return await edits.create_by_admin(tx, who, fields, password_hash, group)

    user = await call.database.write(work)
    return edited(user["version"], user, 201, Location=f"{call.prefix}/users/{user['id']}")


async def list_audit(call: Call) -> Response:
    require_admin(call)
    query = call.query
    page = ListRequest(
        filter=call.filter,
        sort=queries.sorting(AUDIT_FIELDS, query.sort),
        offset=query.start,
        limit=query.limit,
        after=query.after,
    )
    found = await audit.page_of(call.database, page)
    return rendering.page(call, found, last_id=found.rows[-1]["id"] if found.rows else None)


OPERATIONS = [
    Operation(
        "POST",
        "/admin/users",
        create,
        "Add an account (admins only)",
        "accounts",
        {201: credentials.User},
        description="It is active at once, whether accounts are activated by mail or not.",
        body=TypeAdapter(profiles.NewAccountBody),
        check=registration.password_problems,
        signed_in=True,
        errors=(403, 409, 429),
        answer_headers=("Location", "ETag"),
    ),
    Operation(
        "GET",
        "/admin/audit",
        list_audit,
        "List what admins did to accounts, newest first (admins only)",
        "accounts",
        {200: list[credentials.AuditEntry]},
        description="With `after`, oldest first. It is kept for good, and holds nothing personal.",
        query_model=queries.TrailQuery,
        filters=AUDIT_FIELDS,
        signed_in=True,
        errors=(403,),
        answer_headers=LIST_HEADERS,
    ),
    Operation(
        "POST",
        "/admin/users/{id}/change-group",
        change_group,
        "Put a user into another group (admins only)",
        "accounts",
        {200: credentials.User},
        description="The last admin stays one.",
        path_model=queries.ById,
        body=TypeAdapter(credentials.GroupBody),
        signed_in=True,
        errors=(403, 404, 409),
        answer_headers=("ETag",),
    ),
    Operation(
        "POST",
        "/admin/users/{id}/activate",
        activate,
        "Let a user sign in again (admins only)",
        "accounts",
        {200: credentials.User},
        path_model=queries.ById,
        signed_in=True,
        errors=(403, 404),
        answer_headers=("ETag",),
    ),
    Operation(
        "POST",
        "/admin/users/{id}/deactivate",
        deactivate,
        "Shut a user out (admins only)",
        "accounts",
        {200: credentials.User},
        description="All sessions of the user end, and nobody signs in to the account before it is activated.",
        path_model=queries.ById,
        signed_in=True,
        errors=(403, 404, 409),
        answer_headers=("ETag",),
    ),
]
