"""Optimistic locking: versions, `If-Match` and the difference between two states of a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.errors import PreconditionFailed

Row = Mapping[str, Any]  # the values of a row by column

# The versions that If-Match allows; None allows any.
IfMatch = frozenset[int] | None

# Columns that change with every edit; a change to only these does not count as an edit.
BOOKKEEPING = frozenset({"version", "updated_at"})


def require_version(name: str, row: Mapping[str, Any], if_match: IfMatch) -> None:
    """Raise PreconditionFailed unless `if_match` allows the row's version. `name` is the kind of the row."""
    if if_match is not None and row["version"] not in if_match:
        raise PreconditionFailed(f"{name} {row['id']} is at version {row['version']} now")


def changed_names(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the names in `after` whose values differ from those in `before`, in the order of `after`."""
    return [name for name, value in after.items() if before[name] != value]
