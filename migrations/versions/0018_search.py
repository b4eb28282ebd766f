"""the index of the words of rows, for search"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import TSVECTOR

from core.texts import tokens

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

ROWS_AT_A_TIME = 2_000
# The searched columns of each table, the most important first.
TABLES: Mapping[str, Sequence[str]] = {
    "movies": ("title", "actors", "description"),
    "characters": ("name", "description"),
    "genres": ("name", "description"),
    "actors": ("name", "biography"),
    "countries": ("name", "code"),
    "languages": ("name", "code"),
    "comments": ("text",),
}
LISTS = ("actors",)  # the columns that hold several strings
# The table of FTS5 holds an index of tokens that are already words: `ascii` splits them at spaces only. It stores no
# positions, because a query consists of single words, and no texts, which it reads from the table of the words. The
# indexes of prefixes save merging the rows of the many words that begin with two or three letters.
FTS = """
CREATE VIRTUAL TABLE {0}_fts USING fts5(
    {1}, content='{0}_search', content_rowid='id', tokenize='ascii', detail=none, columnsize=0, prefix='2 3'
)
"""
# The tokens are stored, because making them again for each row takes most of the time of a search that reads the whole
# table, as PostgreSQL does if most rows match. The cast splits at spaces, as no token has a quote, backslash or colon.
# Each search reads the whole list of pending entries, so the list is kept short (the limit is in KiB).
GIN = """
CREATE INDEX ix_{0}_search_words ON {0}_search USING gin (tokens) WITH (gin_pending_list_limit = 256)
"""


def _text() -> sa.types.TypeEngine[Any]:
    return sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def _tokens_of(columns: Sequence[str]) -> sa.Computed:
    return sa.Computed(f"CAST({' || '.join(columns)} AS tsvector)", persisted=True)


def upgrade() -> None:
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    for name, columns in TABLES.items():
        op.create_table(
            f"{name}_search",
            sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
            *(sa.Column(column, _text(), nullable=False) for column in columns),
            *(sa.Column(f"exact_{column}", _text(), nullable=True) for column in columns),
            *(() if is_sqlite else (sa.Column("tokens", TSVECTOR, _tokens_of(columns), nullable=False),)),
            sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{name}_search")),
        )
        _index(name, columns)
        # The whole index is built at once, which is faster than adding row by row, and takes as little memory.
        if is_sqlite:
            op.execute(FTS.format(name, ", ".join(columns)))
            op.execute(f"INSERT INTO {name}_fts({name}_fts) VALUES ('rebuild')")  # noqa: S608 (names of our own tables)
        else:
            op.execute(GIN.format(name))


def _index(name: str, columns: Sequence[str]) -> None:
    bind, last = op.get_bind(), 0
    source = sa.table(name, *(sa.column(each, sa.JSON() if each in LISTS else None) for each in ("id", *columns)))
    exact = (f"exact_{column}" for column in columns)
    target = sa.table(f"{name}_search", *map(sa.column, ("id", *columns, *exact)))
    page = sa.select(source).order_by(source.c.id).limit(ROWS_AT_A_TIME)
    while found := bind.execute(page.where(source.c.id > last)).mappings().all():
        last = found[-1]["id"]
        bind.execute(target.insert(), [_indexed({**row}, columns) for row in found])


def _indexed(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"id": row["id"]}
    for column, exact in zip(columns, tokens.sources_of(row, columns), strict=True):
        plain = tokens.folded(exact)
        found |= {column: plain, f"exact_{column}": exact if exact != plain else None}
    return found


def downgrade() -> None:
    for name in TABLES:
        if op.get_bind().dialect.name == "sqlite":
            op.drop_table(f"{name}_fts")
        op.drop_table(f"{name}_search")
