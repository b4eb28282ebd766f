"""Registering, signing in and out, who am I, and what admins do to accounts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from starlette.responses import Response

import account_schemas
from errors import Forbidden, Unauthenticated
from repository import sessions, users
from repository.sessions import Device
from repository.transaction import Transaction
from routes import queries, rendering
from routes.operation import LIST_HEADERS, Call, Operation
from routes.parsing import FORM_MEDIA_TYPE, JSON_MEDIA_TYPE
from security import Group


async def register(call: Call) -> Response:
    fields = call.body.model_dump(exclude_unset=True)
    password = fields.pop("password", None) or fields.pop("hashedPassword")
    fields.pop("hashedPassword", None)
    # Before the transaction: hashing takes tens of milliseconds, and the log has one writer at a time.
    password_hash = await call.services.passwords.hash(password)

    async def work(tx: Transaction) -> dict[str, object]:
        return await users.create(tx, fields, password_hash)

    return rendering.JSONResponse(await call.database.write(work), 201)


async def _sign_in(call: Call, login: str, password: str) -> Response:
    user = await users.find_by_login(call.database, login)
    known_hash = user["password_hash"] if user is not None else None
    if not await call.services.passwords.verify(password, known_hash) or user is None or not user["is_active"]:
        raise Unauthenticated("The name or the password is wrong")
    user_id = user["id"]
    lifetime = call.services.tokens.lifetime_seconds
    device = Device(call.headers.get("user-agent"), call.address)

    async def work(tx: Transaction) -> dict[str, Any]:
        return await sessions.begin(tx, user_id, device, lifetime)

    session = await call.database.write(work)
    token = {
        "access_token": call.services.tokens.issue(user_id, session["id"]),
        "token_type": "bearer",
        "expires_in": lifetime,
        "user_id": user_id,
    }
    # RFC 6749, section 5.1: tokens are not for caches.
    return rendering.JSONResponse(token, headers={"Cache-Control": "no-store"})


async def login(call: Call) -> Response:
    named = call.body.username if "username" in call.body.model_fields_set else call.body.email
    return await _sign_in(call, named, call.body.password)


async def token(call: Call) -> Response:
    return await _sign_in(call, call.body.username, call.body.password)


async def logout(call: Call) -> Response:
    me = call.me

    async def work(tx: Transaction) -> None:
        await sessions.leave(tx, me.user_id, me.session_id)

    await call.database.write(work)
    return Response(status_code=204)


async def list_sessions(call: Call) -> Response:
    query = call.query
    found = await sessions.newest(call.database, call.me.user_id, offset=query.start, limit=query.limit)
    return rendering.page(call, found)


async def end_session(call: Call) -> Response:
    async def work(tx: Transaction) -> None:
        await sessions.end(tx, call.me.user_id, call.path.id)

    await call.database.write(work)
    return Response(status_code=204)


async def me(call: Call) -> Response:
    user = await users.find(call.database, call.me.user_id)
    if user is None:
        raise Unauthenticated("The access token is not valid or has expired")
    found = users.public(user)
    return rendering.JSONResponse(found, headers={"Cache-Control": "no-store"})


def _require_admin(call: Call) -> None:
    if call.me.group is not Group.ADMIN:
        raise Forbidden("Only admins can do this")


async def list_non_admins(call: Call) -> Response:
    _require_admin(call)
    found = await users.list_non_admins(call.database, offset=call.query.start, limit=call.query.limit)
    return rendering.page(call, found)


async def _administer(call: Call, work: Callable[[Transaction], Awaitable[dict[str, Any]]]) -> Response:
    _require_admin(call)
    return rendering.JSONResponse(await call.database.write(work))


async def change_group(call: Call) -> Response:
    group = Group(call.body.group)
    return await _administer(call, lambda tx: users.change_group(tx, call.me.user_id, call.path.id, group))


async def activate(call: Call) -> Response:
    return await _administer(call, lambda tx: users.activate(tx, call.me.user_id, call.path.id))


async def deactivate(call: Call) -> Response:
    return await _administer(call, lambda tx: users.deactivate(tx, call.me.user_id, call.path.id))


class BySessionId(queries.Query):
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]


OPERATIONS = [
    Operation(
        "POST",
        "/auth/register",
        register,
        "Register",
        "accounts",
        {201: account_schemas.User},
        body=TypeAdapter(account_schemas.RegisterBody),
        errors=(409, 429),
    ),
    Operation(
        "POST",
        "/users",
        register,
        "Register (the same as /auth/register)",
        "accounts",
        {201: account_schemas.User},
        body=TypeAdapter(account_schemas.RegisterBody),
        errors=(409, 429),
    ),
    Operation(
        "POST",
        "/auth/login",
        login,
        "Sign in",
        "accounts",
        {200: account_schemas.Token},
        body=TypeAdapter(account_schemas.LoginBody),
        errors=(401, 429),
    ),
    Operation(
        "POST",
        "/token",
        token,
        "Sign in with an OAuth2 password form or JSON",
        "accounts",
        {200: account_schemas.Token},
        body=TypeAdapter(account_schemas.TokenForm),
        body_media_types=(FORM_MEDIA_TYPE, JSON_MEDIA_TYPE),
        errors=(401, 429),
    ),
    Operation(
        "POST",
        "/auth/logout",
        logout,
        "Sign out",
        "accounts",
        {204: None},
        description="Ends this session: its tokens are refused and its websockets closed, at once.",
        signed_in=True,
    ),
    Operation(
        "GET",
        "/auth/sessions",
        list_sessions,
        "List where I am signed in, newest first",
        "accounts",
        {200: list[account_schemas.Session]},
        query_model=queries.PageQuery,
        signed_in=True,
        answer_headers=LIST_HEADERS,
    ),
    Operation(
        "DELETE",
        "/auth/sessions/{id}",
        end_session,
        "Sign out somewhere else",
        "accounts",
        {204: None},
        description="Ends one of the caller's sessions, as signing out does.",
        path_model=BySessionId,
        signed_in=True,
        errors=(404,),
    ),
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
