"""What movies and characters have in common, and where they differ, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Table

from core import filters


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of entity. `name` is its topic, its path and its table; `label` the column of `/names`."""

    name: str
    singular: str
    table: Table
    label: str
    searched: tuple[str, ...]
    fields: Mapping[str, filters.Field]
    # The columns an editor writes, with what they hold when left out, in the order of the table.
    defaults: Mapping[str, Any]
    # The columns that follow from other tables, with what they begin with.
    derived: Mapping[str, Any]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(str(column.name) for column in self.table.columns)
