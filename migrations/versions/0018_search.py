"""the index of the words of rows, for search"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

from core.texts import tokens

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

ROWS_AT_A_TIME = 2_000
# The searched columns of each table, the label first.
TABLES: Mapping[str, Sequence[str]] = {
    "movies": ("title", "description"),
    "characters": ("name", "description"),
    "genres": ("name", "description"),
    "actors": ("name", "biography"),
    "countries": ("name", "code"),
    "languages": ("name", "code"),
    "comments": ("text",),
}
# The table of FTS5 holds an index of tokens that are already words: `ascii` splits them at spaces only. It stores no
# positions, because a query consists of single words, and no texts, which it reads from the table of the words.
FTS = """
CREATE VIRTUAL TABLE {0}_fts USING fts5(
    label, words, content='{0}_search', content_rowid='id', tokenize='ascii', detail=none, columnsize=0, prefix='2 3'
)
"""
FORGET = "INSERT INTO {0}_fts({0}_fts, rowid, label, words) VALUES ('delete', old.id, old.label, old.words);"
STORE = "INSERT INTO {0}_fts(rowid, label, words) VALUES (new.id, new.label, new.words);"
TRIGGERS = (
    f"CREATE TRIGGER {{0}}_search_insert AFTER INSERT ON {{0}}_search BEGIN {STORE} END",
    f"CREATE TRIGGER {{0}}_search_delete AFTER DELETE ON {{0}}_search BEGIN {FORGET} END",
    "CREATE TRIGGER {0}_search_update AFTER UPDATE OF label, words ON {0}_search"
    f" WHEN old.label <> new.label OR old.words <> new.words BEGIN {FORGET} {STORE} END",
)
# Each search reads the whole list of pending entries, so the list is kept short (the limit is in KiB).
GIN = """
CREATE INDEX ix_{0}_search_words ON {0}_search
USING gin (array_to_tsvector(array_remove(string_to_array(label || words, ' '), '')))
WITH (gin_pending_list_limit = 256)
"""


def _text() -> sa.types.TypeEngine[Any]:
    return sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    for name, columns in TABLES.items():
        op.create_table(
            f"{name}_search",
            sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
            sa.Column("label", _text(), nullable=False),
            sa.Column("words", _text(), nullable=False),
            sa.Column("exact_label", _text(), nullable=True),
            sa.Column("exact_words", _text(), nullable=True),
            sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{name}_search")),
        )
        _index(name, columns)
        # The whole index is built at once, which is faster than adding row by row, and takes as little memory.
        if is_sqlite:
            op.execute(FTS.format(name))
            op.execute(f"INSERT INTO {name}_fts({name}_fts) VALUES ('rebuild')")  # noqa: S608 (names of our own tables)
            for trigger in TRIGGERS:
                op.execute(trigger.format(name))
        else:
            op.execute(GIN.format(name))


def _index(name: str, columns: Sequence[str]) -> None:
    bind, last = op.get_bind(), 0
    source = sa.table(name, *map(sa.column, ("id", *columns)))
    target = sa.table(f"{name}_search", *map(sa.column, ("id", "label", "words", "exact_label", "exact_words")))
    page = sa.select(source).order_by(source.c.id).limit(ROWS_AT_A_TIME)
    while found := bind.execute(page.where(source.c.id > last)).mappings().all():
        last = found[-1]["id"]
        bind.execute(target.insert(), [_indexed({**row}, columns) for row in found])


def _indexed(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    exact = tokens.label_and_words(row, columns)
    label, words = map(tokens.folded, exact)
    return {
        "id": row["id"],
        "label": label,
        "words": words,
        "exact_label": exact[0] if exact[0] != label else None,
        "exact_words": exact[1] if exact[1] != words else None,
    }


def downgrade() -> None:
    for name in TABLES:
        if op.get_bind().dialect.name == "sqlite":
            op.drop_table(f"{name}_fts")
        op.drop_table(f"{name}_search")
