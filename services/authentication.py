"""Who an access token belongs to, and whether the account and its session still permit it."""

from __future__ import annotations

from core.errors import Unauthenticated
from core.identity import Group, Identity
from repository.engine.database import Database
from repository.engine.statement import statement
from services.tokens import Tokens

# Asked for with every request that has a token: of the account and of the session in one.
_STANDING = statement(
    'SELECT users."group", users.is_active, users.username FROM sessions JOIN users ON users.id = sessions.user_id'
    " WHERE sessions.id = $1 AND sessions.user_id = $2 AND sessions.ended_at IS NULL"
)


async def identify(database: Database, tokens: Tokens, token: str) -> Identity:
    """Whose token it is. Raises Unauthenticated; a session that ended, and an account that is gone or disabled, count
    at once, on every worker.
    """
    claims = tokens.read(token)
    return await _standing(database, claims.user_id, claims.session_id, claims.expires_at)


async def recheck(database: Database, identity: Identity) -> Identity:
    """The identity as it is now. Raises Unauthenticated when it is no good any more."""
    return await _standing(database, identity.user_id, identity.session_id, identity.expires_at)


async def _standing(database: Database, user_id: int, session_id: str, expires_at: float) -> Identity:
    found = await database.fetch(_STANDING, session_id, user_id)
    if not found or not found[0][1]:
        raise Unauthenticated("The access token is not valid or has expired")
    group, _, username = found[0]
    return Identity(user_id, Group(group), expires_at, session_id, username)
