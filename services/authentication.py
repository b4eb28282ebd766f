"""Identifying users: the one place that decides whether an access token is valid.

A token is valid while its signature and times are valid, its session has not ended and its account is active.
"""

from __future__ import annotations

import structlog

from core.errors import Unauthenticated, invalid_token
from core.identity import Group, Identity
from repository.engine import rights
from repository.engine.database import Database
from services.tokens import Tokens

log = structlog.get_logger("sign-in")


def invalid_access_token() -> Unauthenticated:
    return invalid_token("access")


async def identify(database: Database, tokens: Tokens, token: str, address: str | None) -> Identity:
    """Return the identity that an access token belongs to. `address` is the client's address, for the log.

    The end of a session and the deletion or deactivation of an account take effect immediately, on every worker. Raises
    Unauthenticated.
    """
    line = log.bind(address=address)
    try:
        claims = tokens.read(token)
        line = line.bind(user_id=claims.user_id)
        return await _current(database, claims.user_id, claims.session_id, claims.expires_at)
    except Unauthenticated:
        line.info("access token rejected")
        raise


async def recheck(database: Database, identity: Identity) -> Identity:
    """Return the current state of an identity. Raises Unauthenticated when the identity is no longer valid."""
    if rights.is_expired(identity):
        raise invalid_access_token()
    return await _current(database, identity.user_id, identity.session_id, identity.expires_at)


async def _current(database: Database, user_id: int, session_id: str, expires_at: float) -> Identity:
    found = await database.fetch(rights.ACCOUNT_OF_SESSION, session_id, user_id)
    if not found or not found[0][1]:
        raise invalid_access_token()
    group, _, username = found[0]
    return Identity(user_id, Group(group), expires_at, session_id, username)
