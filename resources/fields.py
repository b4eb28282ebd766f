"""Fields that every resource can be filtered by."""

from __future__ import annotations

from core import filters
from core.filters import Kind

_COMMON = (("user_id", Kind.INTEGER), ("version", Kind.INTEGER), ("created_at", Kind.TIME), ("updated_at", Kind.TIME))


def _fields(*pairs: tuple[str, Kind]) -> dict[str, filters.Field]:
    return {name: filters.Field(name, name, kind) for name, kind in (*pairs, *_COMMON)}
