"""Issuing and verifying access and refresh tokens (JWT). No I/O except for the clock and random token ids."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Sequence
from enum import StrEnum

from jose import JWTError, jwk, jwt
from jose.exceptions import JOSEError

from core.errors import invalid_token
from core.identity import CLOCK_LEEWAY_SECONDS, Claims
from schemas import MAX_ID, UUID

ISSUER = "marquee"
AUDIENCE = "marquee"
MAX_VERIFIED_TOKENS = 10_000
_USER_ID = re.compile(r"[1-9][0-9]{0,18}")
_SESSION_ID = re.compile(UUID)


class TokenType(StrEnum):
    """The values of the claim `typ`. A token of one type is not accepted in place of the other."""

    ACCESS = "access"
    REFRESH = "refresh"


class Tokens:
    """The signer and verifier of tokens (JWT, RFC 7519, HMAC only).

    New tokens are signed with the first key. The header's `kid` selects the key that verifies a token; a token without
    `kid` is verified with the first key. So a key can be replaced without signing users out.
    """

    def __init__(self, keys: Sequence[str], algorithm: str, *, access_seconds: int, refresh_seconds: int) -> None:
        self.access_seconds = access_seconds
        self.refresh_seconds = refresh_seconds
        # The keys are objects, because jose would parse a string that looks like JSON as JSON when it verifies a token.
        self._keys = {_key_id(key): jwk.construct(key, algorithm) for key in keys}
        self._key_id = _key_id(keys[0])
        self._key = self._keys[self._key_id]
        self._algorithm = algorithm
        # The claims of access tokens by digest, so that a client's further requests need not verify the signature.
        self._verified: dict[bytes, Claims] = {}

    def issue(self, user_id: int, session_id: str) -> str:
        """Return a new access token."""
        return self._issue(TokenType.ACCESS, user_id, session_id, new_token_id(), self.access_seconds)

    def issue_refresh(self, user_id: int, session_id: str, token_id: str) -> str:
        """Return a new refresh token. The token is valid only while the session's row stores the token's id."""
        return self._issue(TokenType.REFRESH, user_id, session_id, token_id, self.refresh_seconds)

    def _issue(self, token_type: TokenType, user_id: int, session_id: str, token_id: str, lifetime_seconds: int) -> str:
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": str(user_id),
            "sid": session_id,
            "iat": now,
            "exp": now + lifetime_seconds,
            "jti": token_id,
            "typ": token_type.value,
        }
        return str(jwt.encode(claims, self._key, algorithm=self._algorithm, headers={"kid": self._key_id}))

    def read(self, token: str) -> Claims:
        """Return the claims of an access token. Raises Unauthenticated for any other string."""
        # Verifying a signature takes far longer than this digest. A verified token can become invalid only by expiring.
        digest = hashlib.sha256(token.encode(errors="surrogatepass")).digest()
        claims = self._verified.get(digest)
        if claims is not None and claims.expires_at + CLOCK_LEEWAY_SECONDS > time.time():
            return claims
        claims = self._read(token, TokenType.ACCESS)
        while len(self._verified) >= MAX_VERIFIED_TOKENS:
            del self._verified[next(iter(self._verified))]  # the oldest entry
        self._verified[digest] = claims
        return claims

    def read_refresh(self, token: str) -> Claims:
        """Return the claims of a refresh token. Raises Unauthenticated for any other string."""
        return self._read(token, TokenType.REFRESH)

    def _read(self, token: str, token_type: TokenType) -> Claims:
        try:
            header = jwt.get_unverified_header(token)
            # jose ignores "crit", but RFC 7515, section 4.1.11, requires unknown critical headers to be rejected.
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
            if claims.get("typ") != token_type:
                raise JWTError(f"not a token of the type {token_type}")
            subject = claims["sub"]
            if not (isinstance(subject, str) and _USER_ID.fullmatch(subject) and int(subject) <= MAX_ID):
                raise JWTError("not a user id")
            session_id = claims.get("sid")
            if not (isinstance(session_id, str) and _SESSION_ID.fullmatch(session_id)):
                raise JWTError("not a session id")
            return Claims(int(subject), session_id, float(claims["exp"]), str(claims["jti"]))
        except (JOSEError, ValueError, TypeError, KeyError) as error:
            raise invalid_token(token_type) from error


def new_token_id() -> str:
    """Return a random value for the claim `jti`."""
    return secrets.token_hex(16)


def _key_id(key: str) -> str:
    return hashlib.blake2b(key.encode(), digest_size=8, person=b"marquee kid").hexdigest()
