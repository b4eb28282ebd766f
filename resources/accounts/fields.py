"""What lists of accounts, sessions and audit entries can be filtered by."""

from __future__ import annotations

from core import filters
from core.filters import Kind

USER_FIELDS: dict[str, filters.Field] = {
    "id": filters.Field("id", "id", Kind.INTEGER),
    "username": filters.Field("username", "username", Kind.TEXT),
    "email": filters.Field("email", "email", Kind.TEXT),
    "name": filters.Field("name", "name", Kind.TEXT),
    "first_name": filters.Field("first_name", "first_name", Kind.TEXT),
    "last_name": filters.Field("last_name", "last_name", Kind.TEXT),
    "phone_number": filters.Field("phone_number", "phone_number", Kind.TEXT),
    "is_active": filters.Field("is_active", "is_active", Kind.BOOLEAN),
    "awaits_activation": filters.Field("awaits_activation", "awaits_activation", Kind.BOOLEAN),
    "group": filters.Field("group", "group", Kind.TEXT, ("user", "moderator", "admin")),
    "version": filters.Field("version", "version", Kind.INTEGER),
    "created_at": filters.Field("created_at", "created_at", Kind.TIME),
    "updated_at": filters.Field("updated_at", "updated_at", Kind.TIME),
}


# By which everybody finds people; the rest of them is for admins.
OTHER_USER_FIELDS: dict[str, filters.Field] = {name: USER_FIELDS[name] for name in ("id", "username", "name")}


AUDIT_FIELDS: dict[str, filters.Field] = {
    "id": filters.Field("id", "id", Kind.INTEGER),
    "actor_id": filters.Field("actor_id", "actor_id", Kind.INTEGER),
    "action": filters.Field("action", "action", Kind.TEXT),
    "user_id": filters.Field("user_id", "user_id", Kind.INTEGER),
    "created_at": filters.Field("created_at", "created_at", Kind.TIME),
}


SESSION_FIELDS: dict[str, filters.Field] = {
    "id": filters.Field("id", "id", Kind.TEXT),
    "user_agent": filters.Field("user_agent", "user_agent", Kind.TEXT),
    "address": filters.Field("address", "address", Kind.TEXT),
    "created_at": filters.Field("created_at", "created_at", Kind.TIME),
}
