"""Signing in and out, and where one is signed in."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from starlette.responses import Response

import account_schemas
from errors import Unauthenticated
from repository import sessions, users
from repository.sessions import Device
from repository.transaction import Transaction
from routes import queries, rendering
from routes.operation import LIST_HEADERS, Call, Operation
from routes.parsing import FORM_MEDIA_TYPE, JSON_MEDIA_TYPE


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


class BySessionId(queries.Query):
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]


OPERATIONS = [
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
]
