"""Signing in and out, and where one is signed in."""

from __future__ import annotations

from typing import Any

import structlog
from pydantic import TypeAdapter
from starlette.responses import Response

from core.errors import Unauthenticated
from repository.accounts import sessions, users
from repository.accounts.sessions import Checked, Device, Renewal
from repository.engine.transaction import Transaction
from resources.accounts import credentials
from routes.http import queries, rendering
from routes.http.limit_groups import LimitGroup
from routes.http.operation import LIST_HEADERS, Call, Operation
from routes.http.parsing import FORM_MEDIA_TYPE, JSON_MEDIA_TYPE
from schemas import Uuid
from services.tokens import new_token_id

# Between the check of a password and the beginning of a session another sign-in may have stored the same password with
# other parameters, or its owner a new one: then it is checked again.
ATTEMPTS = 3

log = structlog.get_logger("sign-in")


async def _sign_in(call: Call, login: str, password: str) -> Response:
    services, login = call.services, login.strip()
    for attempt in range(ATTEMPTS):
        user = await users.find_by_login(call.database, login)
        if attempt == 0:
            await services.lockout.try_to_sign_in(login, user["id"] if user is not None else None, call.address)
        verdict = await services.passwords.verify(password, user["password_hash"] if user is not None else None)
        if user is None or not verdict.is_right:
            break
        checked = Checked(user["password_hash"], verdict.new_hash)
        if (begun := await _begin(call, user["id"], checked)) is not None:
            await services.lockout.signed_in(login, call.address)
            return begun
    raise Unauthenticated(sessions.WRONG_PASSWORD)


async def _begin(call: Call, user_id: int, checked: Checked) -> Response | None:
    device = Device(call.headers.get("user-agent"), call.address)
    renewal = Renewal(new_token_id(), call.services.tokens.refresh_seconds)

    async def work(tx: Transaction) -> dict[str, Any] | None:
        return await sessions.begin(tx, user_id, device, checked, renewal)

    session = await call.database.write(work)
    return _tokens(call, session, renewal) if session is not None else None


def _tokens(call: Call, session: dict[str, Any], renewal: Renewal) -> Response:
    tokens, user_id = call.services.tokens, session["user_id"]
    found = {
        "access_token": tokens.issue(user_id, session["id"]),
        "refresh_token": tokens.issue_refresh(user_id, session["id"], renewal.refresh_id),
        "token_type": "bearer",
        "expires_in": tokens.access_seconds,
        "refresh_expires_in": tokens.refresh_seconds,
        "user_id": user_id,
        "session_id": session["id"],
    }
    # RFC 6749, section 5.1: tokens are not for caches.
    return rendering.JSONResponse(found, headers={"Cache-Control": "no-store"})


async def login(call: Call) -> Response:
    named = call.body.username if "username" in call.body.model_fields_set else call.body.email
    return await _sign_in(call, named, call.body.password)


async def token(call: Call) -> Response:
    if call.body.grant_type == "refresh_token":
        return await refresh(call)
    return await _sign_in(call, call.body.username, call.body.password)


async def refresh(call: Call) -> Response:
    claims = call.services.tokens.read_refresh(call.body.refresh_token)
    renewal = Renewal(new_token_id(), call.services.tokens.refresh_seconds)

    async def work(tx: Transaction) -> dict[str, Any] | None:
        return await sessions.refresh(tx, claims, call.address, renewal)

    session = await call.database.write(work)
    if session is None:
        log.warning("an old refresh token was shown: its session ends", user_id=claims.user_id, address=call.address)
        raise Unauthenticated(sessions.BAD_REFRESH_TOKEN)
    return _tokens(call, session, renewal)


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


async def end_all_sessions(call: Call) -> Response:
    async def work(tx: Transaction) -> None:
        await sessions.end_all(tx, call.me.user_id, actor_id=call.me.user_id)

    await call.database.write(work)
    return Response(status_code=204)


class BySessionId(queries.Query):
    id: Uuid


ABOUT_TOKENS = (
    "The access token goes into the header Authorization, and is good for minutes; the refresh token gets the next pair"
    " (POST /auth/refresh), as long as the session goes on. A 403 says that the password is right, but that the account"
    " waits for its activation or is disabled."
)

OPERATIONS = [
    Operation(
        "POST",
        "/auth/login",
        login,
        "Sign in",
        "accounts",
        {200: credentials.Token},
        description=ABOUT_TOKENS,
        body=TypeAdapter(credentials.LoginBody),
        looks_at_token=False,
        errors=(401, 403, 429),
        limit_group=LimitGroup.SIGN_IN,
    ),
    Operation(
        "POST",
        "/token",
        token,
        "Sign in or refresh with an OAuth2 form or JSON",
        "accounts",
        {200: credentials.Token},
        description=ABOUT_TOKENS,
        body=TypeAdapter(credentials.TokenForm),
        body_media_types=(FORM_MEDIA_TYPE, JSON_MEDIA_TYPE),
        looks_at_token=False,
        errors=(401, 403, 429),
        limit_group=LimitGroup.SIGN_IN,
    ),
    Operation(
        "POST",
        "/auth/refresh",
        refresh,
        "Get the next pair of tokens",
        "accounts",
        {200: credentials.Token},
        description="A refresh token is good once. One that was used before ends its session: somebody else has it.",
        body=TypeAdapter(credentials.RefreshBody),
        looks_at_token=False,
        errors=(401,),
        # Nothing is guessed here, and the people of a whole office refresh from one address.
        limit_group=LimitGroup.WRITE,
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
        {200: list[credentials.Session]},
        query_model=queries.PageQuery,
        signed_in=True,
        answer_headers=LIST_HEADERS,
    ),
    Operation(
        "DELETE",
        "/auth/sessions",
        end_all_sessions,
        "Sign out everywhere",
        "accounts",
        {204: None},
        description="Ends all of the caller's sessions, this one included.",
        signed_in=True,
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
