"""What lists of accounts, sessions and audit entries can be filtered by."""

from __future__ import annotations

from core import filters
from core.filters import FieldType

USER_FIELDS: dict[str, filters.Field] = {
    "id": filters.Field("id", "id", FieldType.INTEGER),
    "username": filters.Field("username", "username", FieldType.TEXT),
    "email": filters.Field("email", "email", FieldType.TEXT),
    "name": filters.Field("name", "name", FieldType.TEXT),
    "first_name": filters.Field("first_name", "first_name", FieldType.TEXT),
    "last_name": filters.Field("last_name", "last_name", FieldType.TEXT),
    "phone_number": filters.Field("phone_number", "phone_number", FieldType.TEXT),
    "is_active": filters.Field("is_active", "is_active", FieldType.BOOLEAN),
    "awaits_activation": filters.Field("awaits_activation", "awaits_activation", FieldType.BOOLEAN),
    "group": filters.Field("group", "group", FieldType.TEXT, ("user", "moderator", "admin")),
    "version": filters.Field("version", "version", FieldType.INTEGER),
    "created_at": filters.Field("created_at", "created_at", FieldType.TIME),
    "updated_at": filters.Field("updated_at", "updated_at", FieldType.TIME),
}


# By which everybody finds people; the rest of them is for admins.
OTHER_USER_FIELDS: dict[str, filters.Field] = {name: USER_FIELDS[name] for name in ("id", "username", "name")}


AUDIT_FIELDS: dict[str, filters.Field] = {
    "id": filters.Field("id", "id", FieldType.INTEGER),
    "actor_id": filters.Field("actor_id", "actor_id", FieldType.INTEGER),
    "action": filters.Field("action", "action", FieldType.TEXT),
    "user_id": filters.Field("user_id", "user_id", FieldType.INTEGER),
    "created_at": filters.Field("created_at", "created_at", FieldType.TIME),
}


SESSION_FIELDS: dict[str, filters.Field] = {
    "id": filters.Field("id", "id", FieldType.TEXT),
    "user_agent": filters.Field("user_agent", "user_agent", FieldType.TEXT),
    "address": filters.Field("address", "address", FieldType.TEXT),
    "created_at": filters.Field("created_at", "created_at", FieldType.TIME),
}
