"""Admin-only operations on accounts."""

from __future__ import annotations

import orjson
from starlette.responses import Response

from core.identity import Group
from repository.accounts import audit, edits, users
from resources.accounts import credentials, profiles
from resources.accounts.fields import AUDIT_FIELDS
from routes.accounts import registration
from routes.accounts.access import as_admin
from routes.http import queries, rendering
from routes.http.operation import Call, Details, Operations
from routes.http.queries import ById, TrailQuery

CHANGE = Details(signed_in=True, answer_headers=("ETag",))

operations = Operations("accounts")


@operations.post(
    "/admin/users",
    "Add an account (admins only)",
    {201: credentials.User},
    description="The account is active immediately, even where accounts are activated by email.",
    check=registration.password_problems,
    signed_in=True,
    errors=(403, 409),
    answer_headers=("Location", "ETag"),
)
async def create(call: Call[None, None, profiles.NewAccountBody]) -> Response:
    editor = as_admin(call)
    fields = profiles.dumped(call.body)
    group = Group(call.body.group)
    password_hash = await call.services.passwords.hash(call.body.password)
    user = await call.write(lambda tx: edits.create_by_admin(tx, editor, fields, password_hash, group))
    location = f"{call.prefix}/users/{user['id']}"
    return rendering.tagged(user["version"], orjson.dumps(user), 201, Location=location)


@operations.listing(
    "/admin/audit",
    "List what staff did to accounts and to other users' rows, newest first (admins only)",
    list[credentials.AuditEntry],
    audit.ORDERING,
    description="With an id as `after`, the oldest entries come first. Entries are kept forever and contain no "
    "personal data.",
    filters=AUDIT_FIELDS,
    signed_in=True,
    errors=(403,),
)
async def list_audit(call: Call[None, TrailQuery, None]) -> Response:
    as_admin(call)
    return rendering.page(call, await audit.page_of(call.database, queries.list_request(call, AUDIT_FIELDS)))


@operations.post(
    "/admin/users/{id}/change-group",
    "Move a user to another group (admins only)",
    {200: credentials.User},
    CHANGE,
    description="The last admin cannot leave the group `admin`.",
    errors=(403, 404, 409),
)
async def change_group(call: Call[ById, None, credentials.GroupBody]) -> Response:
    editor = as_admin(call)
    group = Group(call.body.group)
    user = await call.write(lambda tx: users.change_group(tx, editor, call.path.id, group))
    return rendering.tagged(user["version"], orjson.dumps(user))


@operations.post(
    "/admin/users/{id}/activate",
    "Enable a user's account (admins only)",
    {200: credentials.User},
    CHANGE,
    description="The user can sign in again. If the account awaits activation and its address belongs to another "
    "account, the response is a 409.",
    errors=(403, 404, 409),
)
async def activate(call: Call[ById, None, None]) -> Response:
    editor = as_admin(call)
    user = await call.write(lambda tx: users.activate(tx, editor, call.path.id))
    return rendering.tagged(user["version"], orjson.dumps(user))


@operations.post(
    "/admin/users/{id}/deactivate",
    "Disable a user's account (admins only)",
    {200: credentials.User},
    CHANGE,
    description="Ends all of the user's sessions; the user cannot sign in until the account is activated again.",
    errors=(403, 404, 409),
)
async def deactivate(call: Call[ById, None, None]) -> Response:
    editor = as_admin(call)
    user = await call.write(lambda tx: users.deactivate(tx, editor, call.path.id))
    return rendering.tagged(user["version"], orjson.dumps(user))
