"""Passwords, access tokens and identities. Pure but for the clock; knows no database."""

from __future__ import annotations

import re
import secrets
import time
import unicodedata
from dataclasses import dataclass
from enum import StrEnum

from jose import JWTError, jwt
from jose.exceptions import JOSEError
from passlib.context import CryptContext

from errors import Unauthenticated

ISSUER = "marquee"
AUDIENCE = "marquee"
CLOCK_LEEWAY_SECONDS = 5
_USER_ID = re.compile(r"[1-9][0-9]{0,18}")
_SESSION_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
MAX_USER_ID = 2**63 - 1  # what the database can look for


class Group(StrEnum):
    USER = "user"
    MODERATOR = "moderator"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who is asking. `expires_at` is the token's end in seconds since 1970."""

    user_id: int
    group: Group
    expires_at: float
    session_id: str
    username: str | None

    @property
    def is_staff(self) -> bool:
        return self.group is not Group.USER

    def may_change(self, owner_id: int | None) -> bool:
        return self.is_staff or owner_id == self.user_id

    @property
    def audiences(self) -> frozenset[str]:
        """Which events it may see (`Event.audience`)."""
        return frozenset({PUBLIC_AUDIENCE, f"user:{self.user_id}", f"group:{self.group}"})


PUBLIC_AUDIENCE = "public"
ANONYMOUS_AUDIENCES = frozenset({PUBLIC_AUDIENCE})

# OWASP's password storage cheat sheet: argon2id with 19 MiB, 2 passes, 1 lane.
_passwords = CryptContext(
    schemes=["argon2"],
    argon2__type="ID",
    argon2__memory_cost=19 * 1024,
    argon2__time_cost=2,
    argon2__parallelism=1,
)


def hash_password(password: str) -> str:
    """Takes tens of milliseconds of CPU: call it in a thread."""
    return str(_passwords.hash(password))


def verify_password(password: str, password_hash: str | None) -> bool:
    """The same work whether the user exists (`password_hash` is None) or not. Call it in a thread."""
    if password_hash is None:
        _passwords.dummy_verify()
        return False
    return bool(_passwords.verify(password, password_hash))


def name_key(name: str) -> str:
    """The form in which two spellings of one name are equal (Unicode NFKC, case folded)."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


@dataclass(frozen=True, slots=True)
class Claims:
    """What a good access token says; whether the session goes on, only the database knows."""

    user_id: int
    session_id: str
    expires_at: float


@dataclass(frozen=True, slots=True)
class Tokens:
    """Signs and checks access tokens (JWT, RFC 7519, HMAC only)."""

    key: str
    algorithm: str
    lifetime_seconds: int

    def issue(self, user_id: int, session_id: str) -> str:
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": str(user_id),
            "sid": session_id,
            "iat": now,
            "exp": now + self.lifetime_seconds,
            "jti": secrets.token_hex(8),
            "typ": "access",
        }
        return str(jwt.encode(claims, self.key, algorithm=self.algorithm))

    def read(self, token: str) -> Claims:
        """Raises Unauthenticated for anything but a good access token."""
        try:
            # jose ignores "crit"; RFC 7515, section 4.1.11: what is not understood must be refused.
            if "crit" in jwt.get_unverified_header(token):
                raise JWTError("unknown crit")
            claims = jwt.decode(
                token,
                self.key,
                algorithms=[self.algorithm],
                audience=AUDIENCE,
                issuer=ISSUER,
                options={f"require_{name}": True for name in ("iss", "aud", "sub", "iat", "exp", "jti")}
                | {"leeway": CLOCK_LEEWAY_SECONDS},
            )
            if claims.get("typ") != "access":
                raise JWTError("not an access token")
            subject = claims["sub"]
            if not (isinstance(subject, str) and _USER_ID.fullmatch(subject) and int(subject) <= MAX_USER_ID):
                raise JWTError("not the id of a user")
            session_id = claims.get("sid")
            if not (isinstance(session_id, str) and _SESSION_ID.fullmatch(session_id)):
                raise JWTError("not the id of a session")
            return Claims(int(subject), session_id, float(claims["exp"]))
        except (JOSEError, ValueError, TypeError, KeyError) as error:
            raise Unauthenticated("The access token is not valid or has expired") from error
