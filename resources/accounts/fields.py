"""The fields that lists of users, sessions and audit entries can be filtered and sorted by."""

from __future__ import annotations

from collections.abc import Mapping

import models
from core.filters import Field
from core.identity import Group
from resources.derived import chosen_fields

USER_FIELDS: Mapping[str, Field] = chosen_fields(
    models.users,
    *("id", "username", "email", "name", "first_name", "last_name", "phone_number", "is_active", "awaits_activation"),
    *("group", "version", "created_at", "updated_at"),
    group=tuple(Group),
)
# The fields that users who are not admins can use.
OTHER_USER_FIELDS: Mapping[str, Field] = {name: USER_FIELDS[name] for name in ("id", "username", "name")}
AUDIT_FIELDS: Mapping[str, Field] = chosen_fields(
    models.audit, "id", "actor_id", "action", "resource", "user_id", "created_at"
)
SESSION_FIELDS: Mapping[str, Field] = chosen_fields(models.sessions, "id", "user_agent", "address", "created_at")
