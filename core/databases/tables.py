"""What tables have in common."""

from __future__ import annotations

from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Column, ForeignKey, Index, Integer, SmallInteger, Table

from core.databases.columns import Id, UtcTime, text

EXACT_PREFIX = "exact_"

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def numbered(name: str, *columns: Column[Any] | Index | sa.UniqueConstraint) -> Table:
    """Return a table with an `id` that is never reused, so that no client mistakes a new row for a deleted one."""
    key = Column("id", Id, primary_key=True, autoincrement=True)
    return Table(name, metadata, key, *columns, sqlite_autoincrement=True)


def kept() -> tuple[Column[Any], ...]:
    """Return the columns that the service maintains in every row that clients edit."""
    version = Column("version", Integer, nullable=False)
    return version, Column("created_at", UtcTime, nullable=False), Column("updated_at", UtcTime, nullable=False)


def only(sqlite: str, postgresql: str | None = None) -> dict[str, Any]:
    """Return the options of an index on only the rows that meet a condition."""
    return {"sqlite_where": sa.text(sqlite), "postgresql_where": sa.text(postgresql or sqlite)}


def links(linked: Table, owner: Table, linked_id: str, owner_id: str) -> Table:
    """Return a table of links. A row of `owner` shows its linked rows in the order of `position`."""
    name, part = f"{owner.name.removesuffix('s')}_{linked.name}", partial(Column, primary_key=True, autoincrement=False)
    columns = part(linked_id, Id, ForeignKey(linked.c.id)), part(owner_id, Id, ForeignKey(owner.c.id))
    position = Column("position", SmallInteger, nullable=False)
    index = Index(f"ix_{name}_{owner_id}", owner_id, "position")
    return Table(name, metadata, *columns, position, index, sqlite_with_rowid=False)


def words_of(table: Table, *searched: str) -> Table:
    """Return the table with the words of a table's rows, as `core/texts/tokens.py` makes them.

    For each of the `searched` columns, the most important first, a column with the same name holds the folded tokens,
    each after a space. A column with EXACT_PREFIX before that name holds the exact tokens where they differ. On
    PostgreSQL, all folded tokens are also in a generated column, `tokens`, with a GIN index; on SQLite, they are in a
    table of the extension FTS5, named `<table>_fts`, which `repository/search.py` writes. Alembic cannot express all
    this, so `migrations/versions/0018_search.py` creates it.
    """
    return Table(
        f"{table.name}_search",
        metadata,
        Column("id", Id, primary_key=True, autoincrement=False),
        *(Column(name, text(), nullable=False) for name in searched),
        *(Column(EXACT_PREFIX + name, text()) for name in searched),
    )
