"""The topics of the websocket: what each can be filtered by, and who may watch it."""

from __future__ import annotations

from core import filters
from resources.accounts.fields import AUDIT_FIELDS, SESSION_FIELDS, USER_FIELDS
from resources.characters import CHARACTER_FIELDS
from resources.jobs import JOB_FIELDS
from resources.movies import MOVIE_FIELDS

# What a subscription can filter by.
TOPIC_FIELDS: dict[str, dict[str, filters.Field]] = {
    "movies": MOVIE_FIELDS,
    "characters": CHARACTER_FIELDS,
    "jobs": JOB_FIELDS,
    "users": USER_FIELDS,
    "account": USER_FIELDS,
    "sessions": SESSION_FIELDS,
    "audit": AUDIT_FIELDS,
}


# Who may watch: everybody, one group, or (`self`) each who has signed in, of what is theirs.
TOPICS: dict[str, str] = {
    "movies": "public",
    "characters": "public",
    "jobs": "public",
    "users": "admin",
    "account": "self",
    "sessions": "self",
    "audit": "admin",
}


PUBLIC_TOPICS: frozenset[str] = frozenset(name for name, reader in TOPICS.items() if reader == "public")
