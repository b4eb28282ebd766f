"""Fields that every resource can be filtered by."""

from __future__ import annotations

from core import filters
from core.filters import FieldType

_COMMON = (
    ("user_id", FieldType.INTEGER),
    ("version", FieldType.INTEGER),
    ("created_at", FieldType.TIME),
    ("updated_at", FieldType.TIME),
)


def _fields(*pairs: tuple[str, FieldType]) -> dict[str, filters.Field]:
    return {name: filters.Field(name, name, kind) for name, kind in (*pairs, *_COMMON)}
