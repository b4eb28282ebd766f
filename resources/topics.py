"""The topics of the websocket: for each, the model of its rows, its filterable fields and its audience."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel

from core.filters import Field
from resources.accounts.credentials import AuditEntry, Session, User
from resources.accounts.fields import AUDIT_FIELDS, SESSION_FIELDS, USER_FIELDS
from resources.jobs import JOB_FIELDS, Job
from resources.registry import RESOURCES


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic. Its `audience` is `public`, a group, or `self`. With `self`, each user sees only their own rows."""

    entity: type[BaseModel]
    fields: Mapping[str, Field]
    audience: str
    search: Field | None = None  # the field of searches for words, if the topic has an index of words


_TOPICS: Mapping[str, Topic] = {
    **{
        each.name: Topic(each.entity, each.fields, each.audience, each.search if each.searched else None)
        for each in RESOURCES
    },
    "jobs": Topic(Job, JOB_FIELDS, "public"),
    "users": Topic(User, USER_FIELDS, "admin"),
    "account": Topic(User, USER_FIELDS, "self"),
    "sessions": Topic(Session, SESSION_FIELDS, "self"),
    "audit": Topic(AuditEntry, AUDIT_FIELDS, "admin"),
}

TOPIC_FIELDS: Mapping[str, Mapping[str, Field]] = {name: topic.fields for name, topic in _TOPICS.items()}
TOPIC_SEARCH: Mapping[str, Field] = {name: topic.search for name, topic in _TOPICS.items() if topic.search}
TOPIC_ENTITIES: Mapping[str, type[BaseModel]] = {name: topic.entity for name, topic in _TOPICS.items()}
TOPICS: Mapping[str, str] = {name: topic.audience for name, topic in _TOPICS.items()}
PUBLIC_TOPICS: frozenset[str] = frozenset(name for name, audience in TOPICS.items() if audience == "public")
