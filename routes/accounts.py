"""Registering, signing in, and who am I."""

from __future__ import annotations

from pydantic import TypeAdapter
from starlette.responses import Response

import account_schemas
from errors import Forbidden, Unauthenticated
from repository import users
from repository.transaction import Transaction
from routes import queries, rendering
from routes.operation import Call, Operation
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
    token = {
        "access_token": call.services.tokens.issue(user["id"]),
        "token_type": "bearer",
        "expires_in": call.services.tokens.lifetime_seconds,
        "user_id": user["id"],
    }
    # RFC 6749, section 5.1: tokens are not for caches.
    return rendering.JSONResponse(token, headers={"Cache-Control": "no-store"})


async def login(call: Call) -> Response:
    named = call.body.username if "username" in call.body.model_fields_set else call.body.email
    return await _sign_in(call, named, call.body.password)


async def token(call: Call) -> Response:
    return await _sign_in(call, call.body.username, call.body.password)


async def me(call: Call) -> Response:
    user = await users.find(call.database, call.me.user_id)
    if user is None:
        raise Unauthenticated("The access token is not valid or has expired")
    found = users.public(user)
    return rendering.JSONResponse(found, headers={"Cache-Control": "no-store"})


async def list_non_admins(call: Call) -> Response:
    if call.me.group is not Group.ADMIN:
        raise Forbidden("Only admins can do this")
    found, total = await users.list_non_admins(call.database, offset=call.query.start, limit=call.query.limit)
    return rendering.page(call, found, total)


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
        answer_headers=("X-Total-Count", "Link"),
    ),
]
