"""The identity of a client, and the events that the client may see."""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass
from enum import StrEnum

CLOCK_LEEWAY_SECONDS = 5


class Group(StrEnum):
    """The groups of users, in order of increasing rights: each group has all the rights of the groups before it."""

    USER = "user"
    MODERATOR = "moderator"
    ADMIN = "admin"

    @property
    def rank(self) -> int:
        """The position of this group in the order of rights, starting at 0."""
        return list(Group).index(self)


@dataclass(frozen=True, slots=True)
class Identity:
    """A signed-in user. `expires_at` is when the access token expires, in seconds since 1970."""

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
        """The audiences whose events this identity may see."""
        return frozenset({PUBLIC_AUDIENCE, audience_of_user(self.user_id), f"group:{self.group}"})


def audience_of_user(user_id: int) -> str:
    """Return the audience of events that only this user sees."""
    return f"user:{user_id}"


PUBLIC_AUDIENCE = "public"
ANONYMOUS_AUDIENCES = frozenset({PUBLIC_AUDIENCE})
MAX_KEY_LENGTH = 200  # the width of the narrowest column that stores a key


def unique_key(name: str) -> str:
    """Return the key under which a unique name is stored and looked up.

    Normalising can turn one character into eighteen, and a name that is looked up may contain NUL. A key that is too
    long for its column, or contains NUL, is replaced by its digest.
    """
    key = name_key(name)
    if len(key) <= MAX_KEY_LENGTH and "\x00" not in key:
        return key
    return hashlib.blake2b(key.encode(), digest_size=32).hexdigest()


def name_key(name: str) -> str:
    """Return the normal form of a name (Unicode NFKC, case-folded). All equivalent spellings have the same form."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


@dataclass(frozen=True, slots=True)
class Claims:
    """The claims of a valid token. They do not say whether the session is still open."""

    user_id: int
    session_id: str
    expires_at: float
    token_id: str
