"""Passwords, tokens and identities. Pure but for the clock; knows no database."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Sequence
from enum import StrEnum

from jose import JWTError, jwt
from jose.exceptions import JOSEError

from core.errors import Unauthenticated
from core.identity import CLOCK_LEEWAY_SECONDS, MAX_USER_ID, Claims
from schemas import UUID

ISSUER = "marquee"
AUDIENCE = "marquee"
_USER_ID = re.compile(r"[1-9][0-9]{0,18}")
_SESSION_ID = re.compile(UUID)


class TokenType(StrEnum):
    """The claim `typ`: neither kind of token is good in the place of the other."""

    ACCESS = "access"
    REFRESH = "refresh"


class Tokens:
    """Signs and checks tokens (JWT, RFC 7519, HMAC only).

    The first key signs. All of them verify: the header's `kid` says which, and a token without one is taken for one of
    the first key. So a key can be replaced without anybody being signed out.
    """

    def __init__(self, keys: Sequence[str], algorithm: str, *, access_seconds: int, refresh_seconds: int) -> None:
        self.access_seconds = access_seconds
        self.refresh_seconds = refresh_seconds
        self._key = keys[0]
        self._key_id = _key_id(self._key)
        self._keys = {_key_id(key): key for key in keys}
        self._algorithm = algorithm

    def issue(self, user_id: int, session_id: str) -> str:
        """An access token."""
        return self._issue(TokenType.ACCESS, user_id, session_id, new_token_id(), self.access_seconds)

    def issue_refresh(self, user_id: int, session_id: str, token_id: str) -> str:
        """A refresh token. Of those of a session only the one whose id the session's row holds is good."""
        return self._issue(TokenType.REFRESH, user_id, session_id, token_id, self.refresh_seconds)

    def _issue(self, kind: TokenType, user_id: int, session_id: str, token_id: str, lifetime_seconds: int) -> str:
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": str(user_id),
            "sid": session_id,
            "iat": now,
            "exp": now + lifetime_seconds,
            "jti": token_id,
            "typ": kind.value,
        }
        return str(jwt.encode(claims, self._key, algorithm=self._algorithm, headers={"kid": self._key_id}))

    def read(self, token: str) -> Claims:
        """Raises Unauthenticated for anything but a good access token."""
        return self._read(token, TokenType.ACCESS)

    def read_refresh(self, token: str) -> Claims:
        """Raises Unauthenticated for anything but a good refresh token."""
        return self._read(token, TokenType.REFRESH)

    def _read(self, token: str, kind: TokenType) -> Claims:
        try:
            header = jwt.get_unverified_header(token)
            # jose ignores "crit"; RFC 7515, section 4.1.11: what is not understood must be refused.
            if "crit" in header:
                raise JWTError("unknown crit")
            claims = jwt.decode(
                token,
                self._keys[header["kid"]] if "kid" in header else self._key,
                algorithms=[self._algorithm],
                audience=AUDIENCE,
                issuer=ISSUER,
                options={f"require_{name}": True for name in ("iss", "aud", "sub", "iat", "exp", "jti")}
                | {"leeway": CLOCK_LEEWAY_SECONDS},
            )
            if claims.get("typ") != kind:
                raise JWTError(f"not a token of the kind {kind}")
            subject = claims["sub"]
            if not (isinstance(subject, str) and _USER_ID.fullmatch(subject) and int(subject) <= MAX_USER_ID):
                raise JWTError("not the id of a user")
            session_id = claims.get("sid")
            if not (isinstance(session_id, str) and _SESSION_ID.fullmatch(session_id)):
                raise JWTError("not the id of a session")
            return Claims(int(subject), session_id, float(claims["exp"]), str(claims["jti"]))
        except (JOSEError, ValueError, TypeError, KeyError) as error:
            raise Unauthenticated(f"The {kind} token is not valid or has expired") from error


def new_token_id() -> str:
    """The claim `jti`."""
    return secrets.token_hex(16)


def _key_id(key: str) -> str:
    return hashlib.blake2b(key.encode(), digest_size=8, person=b"marquee kid").hexdigest()
