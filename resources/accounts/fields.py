"""The fields that lists of users, sessions and audit entries can be filtered and sorted by."""

from __future__ import annotations

from core.filters import Field, FieldType

USER_FIELDS: dict[str, Field] = {
    "id": Field("id", "id", FieldType.INTEGER),
    "username": Field("username", "username", FieldType.TEXT),
    "email": Field("email", "email", FieldType.TEXT),
    "name": Field("name", "name", FieldType.TEXT),
    "first_name": Field("first_name", "first_name", FieldType.TEXT),
    "last_name": Field("last_name", "last_name", FieldType.TEXT),
    "phone_number": Field("phone_number", "phone_number", FieldType.TEXT),
    "is_active": Field("is_active", "is_active", FieldType.BOOLEAN),
    "awaits_activation": Field("awaits_activation", "awaits_activation", FieldType.BOOLEAN),
    "group": Field("group", "group", FieldType.TEXT, ("user", "moderator", "admin")),
    "version": Field("version", "version", FieldType.INTEGER),
    "created_at": Field("created_at", "created_at", FieldType.TIME),
    "updated_at": Field("updated_at", "updated_at", FieldType.TIME),
}
# The fields that users who are not admins can use.
OTHER_USER_FIELDS: dict[str, Field] = {name: USER_FIELDS[name] for name in ("id", "username", "name")}
AUDIT_FIELDS: dict[str, Field] = {
    "id": Field("id", "id", FieldType.INTEGER),
    "actor_id": Field("actor_id", "actor_id", FieldType.INTEGER),
    "action": Field("action", "action", FieldType.TEXT),
    "user_id": Field("user_id", "user_id", FieldType.INTEGER),
    "created_at": Field("created_at", "created_at", FieldType.TIME),
}
SESSION_FIELDS: dict[str, Field] = {
    "id": Field("id", "id", FieldType.TEXT),
    "user_agent": Field("user_agent", "user_agent", FieldType.TEXT),
    "address": Field("address", "address", FieldType.TEXT),
    "created_at": Field("created_at", "created_at", FieldType.TIME),
}
