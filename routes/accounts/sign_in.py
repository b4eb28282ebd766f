"""Signing in and out, refreshing tokens, and the sessions of an account."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import structlog
from starlette.responses import Response

from core.errors import Forbidden, TooManyRequests, Unauthenticated, invalid_token
from repository.accounts import sessions, users
from repository.accounts.sessions import Checked, Device, Renewal
from repository.accounts.users import Candidates
from resources.accounts.credentials import LoginBody, RefreshBody, Session, Token, TokenForm, sign_in_of
from routes.http import rendering
from routes.http.limit_groups import LimitGroup
from routes.http.operation import JSON_MEDIA_TYPE, AnyCall, Call, Details, Operations
from routes.http.parsing import FORM_MEDIA_TYPE
from routes.http.queries import ByUuid, PageQuery
from services.tokens import new_token_id

# While a password is being checked, another sign-in may store a new hash with other parameters, or the owner may change
# the password. In either case, the password is checked again.
ATTEMPTS = 3
SIGN_IN = Details(
    description="Send the access token in the header Authorization; it is valid for `expires_in` seconds. The refresh "
    "token can be exchanged for a new pair (POST /auth/refresh) while the session lasts. A 403 means that the password "
    "is right but the account awaits its activation or is disabled.",
    ignores_credentials=True,
    errors=(401, 403),
    limit_group=LimitGroup.SIGN_IN,
    uncompressed=True,
)

operations = Operations("accounts")
log = structlog.get_logger("sign-in")


@operations.post("/auth/login", "Sign in", {200: Token}, SIGN_IN)
async def login(call: Call[None, None, LoginBody]) -> Response:
    return await _sign_in(call, *sign_in_of(call.body))


@operations.post(
    "/token",
    "Sign in or refresh with an OAuth2 form or JSON",
    {200: Token},
    SIGN_IN,
    body_media_types=(FORM_MEDIA_TYPE, JSON_MEDIA_TYPE),
)
async def token(call: Call[None, None, TokenForm]) -> Response:
    if call.body.grant_type == "refresh_token":
        return await _refresh(call, str(call.body.refresh_token))
    return await _sign_in(call, *sign_in_of(call.body))


@operations.post(
    "/auth/refresh",
    "Get the next pair of tokens",
    {200: Token},
    description="A refresh token is valid once. Reusing a token is treated as theft: the response is a 401, and the "
    "session ends.",
    ignores_credentials=True,
    errors=(401,),
    # The stricter limit of sign-in does not apply, because tokens cannot be guessed and all clients of an office may
    # refresh from one address.
    limit_group=LimitGroup.WRITE,
    uncompressed=True,
)
async def refresh(call: Call[None, None, RefreshBody]) -> Response:
    return await _refresh(call, call.body.refresh_token)


async def _sign_in(call: AnyCall, login: str, password: str) -> Response:
    services, login = call.services, login.strip()
    for attempt in range(ATTEMPTS):
        found = await users.find_by_login(call.database, login)
        if attempt == 0:
            await services.lockout.try_to_sign_in(login, found.owner["id"] if found.owner else None, call.address)
        try:
            proven = await _proven(call, login, found, password)
            begun = await _begin(call, *proven) if proven is not None else None
        except (Forbidden, TooManyRequests) as error:
            services.lockout.refused(login, call.address, str(error.detail))
            raise
        except Unauthenticated:
            break  # the account has been deleted meanwhile
        if proven is None:
            break
        if begun is not None:
            await services.lockout.signed_in(login, call.address)
            return begun
    services.lockout.failed(login, call.address)
    raise Unauthenticated(sessions.WRONG_PASSWORD)


async def _proven(call: AnyCall, login: str, found: Candidates, password: str) -> tuple[int, Checked] | None:
    """Return the id of the account that has this password, with the checked hash, or None if no account matches.

    The owner is checked first and can therefore always sign in. Every password but the owner's costs the same work,
    however many accounts were found, and whether or not one of them matches. So the duration does not reveal whether an
    address belongs to an account, or whether other accounts were registered with it.
    """
    proven = await _checked(call, found.owner, password)
    if proven is not None:
        return proven
    is_equalised = "@" in login and call.services.activates_by_mail
    missing = users.MAX_WAITING_CHECKED - len(found.waiting) if is_equalised else 0
    for user in (*found.waiting, *[None] * missing):
        checked = await _checked(call, user, password)
        proven = proven or checked
    return proven


async def _checked(call: AnyCall, user: Mapping[str, Any] | None, password: str) -> tuple[int, Checked] | None:
    """Return the user's id with the checked hash, or None for a wrong password. Without a user, do the same work."""
    verdict = await call.services.passwords.verify(password, user["password_hash"] if user is not None else None)
    if user is None or not verdict.is_right:
        return None
    return user["id"], Checked(user["password_hash"], verdict.new_hash)


async def _begin(call: AnyCall, user_id: int, checked: Checked) -> Response | None:
    device = Device(call.headers.get("user-agent"), call.address)
    renewal = Renewal(new_token_id(), call.services.tokens.refresh_seconds)
    session = await call.write(lambda tx: sessions.begin(tx, user_id, device, checked, renewal))
    return _tokens(call, session, renewal) if session is not None else None


async def _refresh(call: AnyCall, refresh_token: str) -> Response:
    line = log.bind(address=call.address)
    try:
        claims = call.services.tokens.read_refresh(refresh_token)
        line = line.bind(user_id=claims.user_id)
        renewal = Renewal(new_token_id(), call.services.tokens.refresh_seconds)
        session = await call.write(lambda tx: sessions.refresh(tx, claims, call.address, renewal))
    except Unauthenticated:
        line.info("refresh token rejected")
        raise
    if session is None:
        line.warning("refresh token reused; session ended")
        raise invalid_token("refresh")
    return _tokens(call, session, renewal)


def _tokens(call: AnyCall, session: dict[str, Any], renewal: Renewal) -> Response:
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
    # RFC 6749, section 5.1: responses with tokens must not be cached.
    return rendering.JSONResponse(found, headers={"Cache-Control": "no-store"})


@operations.post(
    "/auth/logout",
    "Sign out",
    {204: None},
    description="Ends this session immediately: its tokens are revoked and its websockets are closed.",
    signed_in=True,
)
async def logout(call: Call[None, None, None]) -> Response:
    me = call.me
    await call.write(lambda tx: sessions.leave(tx, me.user_id, me.session_id))
    return Response(status_code=204)


@operations.listing(
    "/auth/sessions", "List my sessions, newest first", list[Session], sessions.ORDERING, signed_in=True
)
async def list_sessions(call: Call[None, PageQuery, None]) -> Response:
    query = call.query
    found = await sessions.newest(
        call.database, call.me.user_id, offset=query.start, limit=query.limit, cursor=call.cursor
    )
    return rendering.page(call, found)


@operations.delete(
    "/auth/sessions",
    "Sign out everywhere",
    description="Ends all of the caller's sessions, including this one.",
    signed_in=True,
)
async def end_all_sessions(call: Call[None, None, None]) -> Response:
    user_id = call.me.user_id
    await call.write(lambda tx: sessions.end_all(tx, user_id, actor_id=user_id))
    return Response(status_code=204)


@operations.delete(
    "/auth/sessions/{id}",
    "End one of my sessions",
    description="Ends the session immediately, as signing out does.",
    signed_in=True,
    errors=(404,),
)
async def end_session(call: Call[ByUuid, None, None]) -> Response:
    await call.write(lambda tx: sessions.end(tx, call.me.user_id, call.path.id))
    return Response(status_code=204)
